//! Bits that turn over at rest.

#[test]
fn a_bit_that_turned_over_in_content_is_never_read() {
    let count = sim_tests::flips::content(600, 1).unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!(count.content, 600);
}

#[test]
fn a_bit_that_turned_over_in_metadata_is_repaired_or_refused() {
    let count = sim_tests::flips::metadata(600, 1).unwrap_or_else(|violation| panic!("{violation}"));
    println!("{count:?}");
    assert_eq!(count.whole + count.refused, 600);
    assert!(count.whole > 0);
}
