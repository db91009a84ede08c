//! Numbers as fio writes them: `4k`, `1m`, `10%`, `500ms`.

/// Parses an amount of data. As in fio with `kb_base=1024` (its default), `k`, `m`, `g`, `t`, `p` (and `kb`, ...)
/// are powers of 1024, while `ki`, `mi`, ... are powers of 1000; with `kb_base=1000` it is the other way round.
/// A leading `0x` means hexadecimal.
pub fn parse_bytes(text: &str, kb_base: u64) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let (number, suffix) = split_number(&lower);
    let bad = || {
        format!("'{text}' is not an amount of data: expected a whole number with an optional k, m, g, t or p")
    };
    let value = parse_whole(number).ok_or_else(bad)?;
    let unit = suffix.strip_suffix('b').unwrap_or(suffix);
    let (letter, opposite) = match unit.strip_suffix('i') {
        Some(letter) => (letter, true),
        None => (unit, false),
    };
    let power = match letter {
        "" if !opposite => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(bad()),
    };
    let other = if kb_base == 1000 { 1024 } else { 1000 };
    let base: u64 = if opposite { other } else { kb_base };
    base.checked_pow(power)
        .and_then(|scale| value.checked_mul(scale))
        .ok_or_else(|| format!("'{text}' does not fit 64 bits"))
}

/// Parses a time into microseconds; `default_unit_us` is what a bare number counts in.
pub fn parse_time_us(text: &str, default_unit_us: u64) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let (number, suffix) = split_number(&lower);
    let bad =
        || format!("'{text}' is not a time: expected a whole number with an optional d, h, m, s, ms or us");
    let value = parse_whole(number).ok_or_else(bad)?;
    let unit = match suffix {
        "" => default_unit_us,
        "us" | "usec" => 1,
        "ms" | "msec" => 1_000,
        "s" | "sec" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return Err(bad()),
    };
    value.checked_mul(unit).ok_or_else(|| format!("'{text}' does not fit 64 bits of microseconds"))
}

/// Parses a plain whole number (decimal or `0x`).
pub fn parse_int(text: &str) -> Result<u64, String> {
    parse_whole(text.trim()).ok_or_else(|| format!("'{text}' is not a whole number"))
}

fn parse_whole(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn split_number(text: &str) -> (&str, &str) {
    let hex = text.starts_with("0x");
    let end = text
        .char_indices()
        .position(|(at, c)| !(c.is_ascii_digit() || hex && (at == 1 || c.is_ascii_hexdigit())))
        .unwrap_or(text.len());
    text.split_at(end)
}

/// Bytes in fio's short binary form: at most four digits and a unit, as `BW=840MiB/s`.
pub fn binary(bytes: f64) -> String {
    scaled(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// Bytes in fio's short decimal form, as `881MB`.
pub fn decimal(bytes: f64) -> String {
    scaled(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// A count in fio's short form, as `IOPS=97.9k`.
pub fn count(value: f64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T", "P"])
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut index = 0;
    // fio keeps four digits before it moves to the next unit: 2355MiB, 97.9k.
    while value >= 9999.5 && index + 1 < units.len() {
        value /= base;
        index += 1;
    }
    if index == 0 || value >= 99.95 {
        return format!("{value:.0}{}", units[index]);
    }
    let digits = if value >= 9.995 { 1 } else { 2 };
    format!("{value:.digits$}{}", units[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_fio_with_both_bases() {
        for (text, base, value) in [
            ("4096", 1024, 4096),
            ("4k", 1024, 4096),
            ("4KB", 1024, 4096),
            ("1mi", 1024, 1_000_000),
            ("1m", 1000, 1_000_000),
            ("4KiB", 1000, 4096),
            ("0x1000", 1024, 4096),
            ("2t", 1024, 2 << 40),
            ("512b", 1024, 512),
        ] {
            assert_eq!(parse_bytes(text, base), Ok(value), "{text} with kb_base {base}");
        }
    }

    #[test]
    fn bad_bytes_say_what_is_accepted() {
        for text in ["", "k", "4x", "-1", "1.5m", "4ib", "99999999999999999999", "99999999p"] {
            let error = parse_bytes(text, 1024).unwrap_err();
            assert!(error.contains("expected") || error.contains("64 bits"), "{text}: {error}");
        }
    }

    #[test]
    fn times_have_units_and_a_default() {
        assert_eq!(parse_time_us("10", 1_000_000), Ok(10_000_000));
        assert_eq!(parse_time_us("10", 1), Ok(10));
        assert_eq!(parse_time_us("5m", 1_000_000), Ok(300_000_000));
        assert_eq!(parse_time_us("250ms", 1_000_000), Ok(250_000));
        assert_eq!(parse_time_us("7usec", 1_000_000), Ok(7));
        assert!(parse_time_us("7y", 1_000_000).is_err());
        assert!(parse_time_us("99999999999999999d", 1_000_000).is_err());
    }

    #[test]
    fn short_forms_look_like_fios() {
        assert_eq!(binary(2355.0 * 1048576.0), "2355MiB");
        assert_eq!(decimal(2_470_000_000.0), "2470MB");
        assert_eq!(count(97_900.0), "97.9k");
        assert_eq!(count(6722.2), "6722");
        assert_eq!(binary(31_719_424.0), "30.2MiB");
    }
}
