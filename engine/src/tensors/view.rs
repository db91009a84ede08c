//! Names of tensors as names of files in `.tensors/`.
//!
//! A tensor may be called anything, `a/b`, `..` and the empty string included. Its view is called [`view_name`]`(name) + ".npy"`:
//! bytes that a file name cannot hold, control characters, `%`, and a leading dot are percent-encoded (`/` is `%2F`), the
//! empty name is a lone `%`. The encoding is reversible ([`tensor_name`]) but for names longer than a file name may be: those keep
//! their beginning and end in `%~` and a 64-bit hash of the whole, and only the index of their file knows them.

/// Longest view name in bytes: 255 (`NAME_MAX`) less `.npy`.
const LONGEST: usize = 251;
/// What stands at the end of a shortened name: `%~` and 16 hex digits.
const HASH_LEN: usize = 18;

/// The file name, without `.npy`, under which a tensor of this name appears. At most 251 bytes, never `.`, `..` or empty,
/// without `/` and control characters.
pub fn view_name(tensor: &str) -> String {
    if tensor.is_empty() {
        return "%".into();
    }
    let mut out = String::with_capacity(tensor.len());
    // Where encoded characters end, so that a cut never splits one.
    let mut cut = 0;
    for (i, c) in tensor.char_indices() {
        if c == '/' || c == '%' || c.is_ascii_control() || (c == '.' && i == 0) {
            out.push_str(&format!("%{:02X}", u32::from(c)));
        } else {
            out.push(c);
        }
        if out.len() <= LONGEST - HASH_LEN {
            cut = out.len();
        }
    }
    if out.len() > LONGEST {
        out.truncate(cut);
        out.push_str(&format!("%~{:016x}", fnv1a(tensor.as_bytes())));
    }
    out
}

/// The inverse of [`view_name`]. `None` for what it never makes, and for shortened names (ask
/// [`TensorIndex::find_view`](super::TensorIndex::find_view), which knows both).
pub fn tensor_name(view: &str) -> Option<String> {
    if view == "%" {
        return Some(String::new());
    }
    let mut out = String::with_capacity(view.len());
    let mut rest = view;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 3)?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        out.push(char::from(u8::from_str_radix(digits, 16).ok()?));
        rest = &rest[at + 3..];
    }
    out.push_str(rest);
    // One spelling only: what would be encoded otherwise is not a view's name.
    (view_name(&out) == view).then_some(out)
}

/// FNV-1a, 64 bit (draft-eastlake-fnv): stable across versions, which std's hashers do not promise.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_are_no_file_names() {
        assert_eq!(view_name("model.layers.0.q_proj.weight"), "model.layers.0.q_proj.weight");
        assert_eq!(view_name("a/b"), "a%2Fb");
        assert_eq!(view_name(".."), "%2E.");
        assert_eq!(view_name("."), "%2E");
        assert_eq!(view_name(""), "%");
        assert_eq!(view_name("../../etc/passwd"), "%2E.%2F..%2Fetc%2Fpasswd");
        assert_eq!(view_name("100%"), "100%25");
        assert_eq!(view_name("a\0b\nc"), "a%00b%0Ac");
        assert_eq!(view_name("größe"), "größe");
    }

    #[test]
    fn only_what_view_name_makes_is_decoded() {
        assert_eq!(tensor_name("a%2Fb").as_deref(), Some("a/b"));
        for no in ["", "%2", "a%zz", "%61", "a%2fb", "..", ".", "a/b", "%+1"] {
            assert_eq!(tensor_name(no), None, "{no:?}");
        }
        let long = "x".repeat(300);
        assert_eq!(tensor_name(&view_name(&long)), None);
    }

    #[test]
    fn long_names_stay_apart() {
        let (a, b) = ("ü".repeat(400) + "a", "ü".repeat(400) + "b");
        assert_ne!(view_name(&a), view_name(&b));
        assert!(view_name(&a).len() <= LONGEST);
    }

    proptest! {
        #[test]
        fn reversible_and_safe(name in "\\PC{0,60}|[./%\\x00-\\x1f]{0,20}") {
            let view = view_name(&name);
            prop_assert!(!view.is_empty() && view != "." && view != "..");
            prop_assert!(view.len() <= LONGEST && !view.contains('/') && !view.contains('\0'));
            if !view.contains("%~") {
                prop_assert_eq!(tensor_name(&view), Some(name));
            }
        }
    }
}
