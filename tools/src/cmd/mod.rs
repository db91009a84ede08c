//! The commands, one file each. Each takes its parsed arguments and returns what `main` turns into an exit code.

pub mod completions;
pub mod disk;
pub mod doctor;
pub mod drive;
pub mod export;
pub mod format;
pub mod import;
pub mod info;
pub mod kv;
pub mod live;
pub mod load;
pub mod ls;
pub mod man;
pub mod measure;
pub mod mount;
pub mod plan;
pub mod report;
pub mod rm;
pub mod stat;
pub mod top;
pub mod train;
pub mod umount;
pub mod verify;
pub mod version;
