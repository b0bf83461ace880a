//! keymill

mod cpu;
mod error;
mod kernel;
mod keys;
pub mod limits;
mod os;
mod request_id;
mod rng;
mod secret;
mod store;
mod wrap;
