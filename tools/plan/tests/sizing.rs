//! docs/sizing.md is what the tables and formulas say now.

#[test]
fn the_committed_page_is_what_would_be_made() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/sizing.md");
    let committed = std::fs::read_to_string(path).expect("docs/sizing.md");
    assert!(committed == plan::seed::page(), "docs/sizing.md has drifted: run `cargo xtask docs`");
}
