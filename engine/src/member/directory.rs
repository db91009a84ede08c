//! A directory of a file system as a member.
