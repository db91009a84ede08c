//! Sizes as people write them, parsed strictly, and sizes as people read them.

/// Parses `8GiB`, `10GB`, `512M`, `4096`: a whole number with an optional unit.
///
/// `K`, `M`, `G`, `T` and `KiB`, `MiB`, ... are powers of 1024; `KB`, `MB`, ... powers of 1000; a bare number or `B` is
/// bytes. Fractions, signs and blanks are refused: a size that is nearly what was meant fills or empties a drive.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(format!(
            "`{text}` is not a size: write a whole number and a unit, such as 8GiB, 10GB or 512M"
        ));
    }
    let number: u64 = number.parse().map_err(|_| format!("`{text}` is too large for a size"))?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "p" | "pib" => 1 << 50,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "pb" => 1_000_000_000_000_000,
        _ => {
            return Err(format!(
                "`{unit}` in `{text}` is not a unit of size: use B, KiB, MiB, GiB, TiB (powers of 1024, also K, M, G, T) \
                 or KB, MB, GB, TB (powers of 1000)"
            ));
        }
    };
    number.checked_mul(factor).ok_or_else(|| format!("`{text}` is too large for a size"))
}

/// [`parse`] for sizes that cannot be zero.
pub fn parse_nonzero(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("a size of 0 makes no sense here".to_owned()),
        size => Ok(size),
    }
}

/// [`parse_nonzero`] for rates: a size, and `/s` where one likes.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    parse_nonzero(text.strip_suffix("/s").unwrap_or(text))
}

/// `1.5 GiB`: three or four significant digits, powers of 1024.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // 1023.95 would be shown as 1024.0, so the step to the next unit is taken a little early.
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `1.94 GB/s`: decimal, as drives are specified.
pub fn rate(bytes_per_second: f64) -> String {
    if !bytes_per_second.is_finite() || bytes_per_second <= 0.0 {
        "-".to_owned()
    } else if bytes_per_second >= 1e9 {
        format!("{:.2} GB/s", bytes_per_second / 1e9)
    } else if bytes_per_second >= 1e6 {
        format!("{:.1} MB/s", bytes_per_second / 1e6)
    } else {
        format!("{:.1} kB/s", bytes_per_second / 1e3)
    }
}

/// `1h02m`, `3m05s`, `4.2s`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 if seconds < 59.95 => format!("{seconds:.1}s"),
        0..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_what_they_say() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("7B", 7),
            ("512M", 512 << 20),
            ("8GiB", 8 << 30),
            ("8gib", 8 << 30),
            ("10GB", 10_000_000_000),
            ("1kb", 1000),
            ("3T", 3 << 40),
            ("16383PiB", 16383 << 50),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            " ",
            "G",
            "1.5G",
            "-1",
            "+1",
            "1 G",
            "1G ",
            " 1G",
            "1GiBs",
            "1GG",
            "0x10",
            "1e9",
            "16384PiB",
            "18446744073709551616",
            "1_000",
            "１",
        ] {
            assert!(parse(text).is_err(), "{text:?} was taken");
        }
        assert!(parse_nonzero("0G").is_err());
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human((1 << 30) - 1), "1.0 GiB");
        assert_eq!(human(u64::MAX), "16.0 EiB");
        assert_eq!(rate(1.944e9), "1.94 GB/s");
        assert_eq!(rate(f64::NAN), "-");
        assert_eq!(duration(59.96), "1m00s");
        assert_eq!(duration(4.21), "4.2s");
        assert_eq!(duration(3720.0), "1h02m");
    }
}
