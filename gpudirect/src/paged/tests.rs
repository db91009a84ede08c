use super::kernel;

/// For tools: `NVTIER_PTX=file cargo test -p nvtier-gpudirect the_module`.
#[test]
fn the_module_is_plain_text() {
    let text = kernel::ptx();
    assert!(text.is_ascii() && !text.contains('\0'));
    if let Some(path) = std::env::var_os("NVTIER_PTX") {
        std::fs::write(path, text).unwrap();
    }
}
