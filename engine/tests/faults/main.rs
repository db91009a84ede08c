//! Faults in flight: every operation of a workload goes wrong in every way, and the pool is right or says where it is not.
#![allow(missing_docs)]

mod lab;
mod matrix;
mod single;
