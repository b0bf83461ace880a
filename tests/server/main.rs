//! Goal: the server speaks the KMS's wire protocol, and refuses everything else in the KMS's words, with nothing done.
//!
//! Method: a client of our own (`client`), written from the protocol's description and not from the server, asks a
//! [`Service`](keymill::server::Service) without sockets, and a [`Server`](keymill::server::Server) on loopback
//! (`sockets`, `crowds`, `shares`, `stalls`, `refusals`, `tls`, `watching`). Whatever is answered is read by prost and must
//! be what prost would write.
#![cfg(feature = "server")]

mod access;
mod bodies;
mod client;
mod crowds;
mod heads;
mod operations;
mod refusals;
mod running;
mod shares;
mod sockets;
mod stalls;
mod tls;
mod tls_files;
mod watching;
