//! Tests of the kernel interface, to be run for every tier.
