//! `nvtier version`: this build, and what the kernel under it can do.

use serde_json::json;

use crate::cli::Global;
use crate::failure::Outcome;
use crate::output;

/// For programs.
pub fn facts() -> serde_json::Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "arch": std::env::consts::ARCH,
        "debug_build": cfg!(debug_assertions),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "io_uring": nvme::Queue::builder().depth(2).backend(nvme::Backend::IoUring).build().is_ok(),
        "fuse": std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok(),
    })
}

/// Prints it.
pub fn run(global: &Global) -> Outcome {
    if global.json {
        return output::json(&facts());
    }
    let uname = rustix::system::uname();
    let kernel = uname.release().to_string_lossy().into_owned();
    let io_uring = nvme::Queue::builder().depth(2).backend(nvme::Backend::IoUring).build();
    let io_uring = match &io_uring {
        Ok(_) => "yes".to_owned(),
        Err(error) => format!("no ({error}): threads with pread and pwrite are used"),
    };
    let fuse = match std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => "yes".to_owned(),
        Err(error) => format!("no (/dev/fuse: {error}): pools cannot be mounted"),
    };
    let profile = if cfg!(debug_assertions) { " (debug build: slow)" } else { "" };
    output::line(&format!(
        "nvtier {}{profile}\nkernel    {kernel} {}\nio_uring  {io_uring}\nfuse      {fuse}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    ))
}
