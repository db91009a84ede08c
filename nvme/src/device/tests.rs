//! Tests of the kernel-served devices.
