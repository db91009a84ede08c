//! The pool as a file system.
#![forbid(unsafe_code)]
