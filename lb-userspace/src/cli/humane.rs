//! Numbers and times as people read them.

use std::time::{Duration, SystemTime};

/// A length of time in its largest unit: `5s`, `42s`, `3m`, `2h`, `9d`; two units below ten hours (`2h05m`).
pub fn span(duration: Duration) -> String {
    let s = duration.as_secs();
    let (minutes, hours, days) = (s / 60, s / 3_600, s / 86_400);
    match s {
        0..60 => format!("{s}s"),
        60..600 => format!("{minutes}m{:02}s", s % 60),
        600..3_600 => format!("{minutes}m"),
        3_600..36_000 => format!("{hours}h{:02}m", minutes % 60),
        36_000..172_800 => format!("{hours}h"),
        _ => format!("{days}d"),
    }
}

/// How long ago `then` was; `0s` for the future, which only clocks that disagree make.
pub fn age(now: SystemTime, then: SystemTime) -> String {
    span(now.duration_since(then).unwrap_or_default())
}

/// Microseconds: `80 µs`, `1.3 ms`, `2.0 s`.
pub fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// A number with a decimal prefix from a thousand on: `0`, `7.5`, `950`, `1.2k`, `34k`, `5.0M`.
pub fn short(value: f64) -> String {
    if !value.is_finite() || value < 0.05 {
        return "0".into();
    }
    let mut value = value;
    for unit in ["", "k", "M", "G", "T"] {
        let digits = usize::from(value < 9.95 && (!unit.is_empty() || value.fract().abs() > 0.049));
        if value < 999.5 {
            return format!("{value:.digits$}{unit}");
        }
        value /= 1_000.0;
    }
    format!("{value:.0}P")
}

/// Bytes a second: `0 B/s`, `1.2 kB/s`.
pub fn byte_rate(value: f64) -> String {
    let text = short(value);
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    format!("{digits} {}B/s", &text[digits.len()..])
}

/// A whole number with thousands apart: `262,144`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Time of day, UTC, with milliseconds: `14:02:33.120Z`.
pub fn clock(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let s = since.as_secs() % 86_400;
    format!(
        "{:02}:{:02}:{:02}.{:03}Z",
        s / 3_600,
        s / 60 % 60,
        s % 60,
        since.subsec_millis()
    )
}

/// A length of time as people write it: `500ms`, `30s`, `5m`, `1h`.
///
/// # Errors
/// What is wrong with it, and how to write it.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no length of time; write it as 500ms, 30s, 5m or 1h");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let milliseconds = match &text[digits.len()..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number
        .checked_mul(milliseconds)
        .map(Duration::from_millis)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_name_at_most_two_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m00s"),
            (599, "9m59s"),
            (600, "10m"),
            (3_600, "1h00m"),
            (7_260, "2h01m"),
            (36_000, "10h"),
            (100_000, "27h"),
            (172_800, "2d"),
        ] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(age(now, now + Duration::from_secs(5)), "0s");
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.04, "0"),
            (0.5, "0.5"),
            (2.0, "2"),
            (7.25, "7.2"),
            (950.4, "950"),
            (999.9, "1.0k"),
            (1_234.0, "1.2k"),
            (34_000.0, "34k"),
            (5e6, "5.0M"),
            (f64::NAN, "0"),
        ] {
            assert_eq!(short(value), text, "{value}");
        }
        assert_eq!(byte_rate(1_234.0), "1.2 kB/s");
        assert_eq!(byte_rate(0.0), "0 B/s");
        assert_eq!(grouped(262_144), "262,144");
        assert_eq!(grouped(7), "7");
        assert_eq!(micros(1_250), "1.2 ms");
        assert_eq!(micros(80), "80 µs");
    }

    #[test]
    fn spans_are_read_back() {
        for (text, ms) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("0s", 0),
        ] {
            assert_eq!(parse_span(text), Ok(Duration::from_millis(ms)));
        }
        for wrong in [
            "",
            "30",
            "s",
            "1.5s",
            "-1s",
            "30 s",
            "1d",
            "99999999999999999999s",
            "9999999999999999999h",
        ] {
            assert!(parse_span(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_clock_is_utc() {
        assert_eq!(
            clock(SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_225_600_120)),
            "00:00:00.120Z"
        );
    }
}
