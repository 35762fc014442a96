//! Values that a person writes as text: durations, sizes, port ranges, addresses.

use std::ops::RangeInclusive;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};

use crate::error::{Error, Kind, Result};

/// Reads `5s`, `10min`, `7d`, `1h 30min`. A day has 24 hours; months and years have no fixed length and are refused.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let bad = || {
        Error::new(Kind::BadInput, format!("'{text}' is not a duration"))
            .hint("write a number with a unit, as in '5s', '10min', '12h' or '7d'")
    };
    let span: Span = text.parse().map_err(|_| bad())?;
    let signed = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| bad())?;
    Duration::try_from(signed).map_err(|_| bad())
}

/// Reads `16GiB`, `512 MiB`, `100GB` or a bare number of bytes: `KiB` is 1024 bytes, `kB` is 1000.
pub fn parse_size(text: &str) -> Result<u64> {
    const UNITS: [(&str, u64); 10] = [
        ("", 1),
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    let bad = || {
        Error::new(Kind::BadInput, format!("'{text}' is not a size"))
            .hint("write a number with a unit, as in '512MiB' or '16GiB'")
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = UNITS.iter().find(|row| row.0 == unit.trim()).ok_or_else(bad)?.1;
    number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(bad)
}

/// Reads `5500-5599`.
pub fn parse_ports(text: &str) -> Result<RangeInclusive<u16>> {
    let port = |digits: &str| digits.trim().parse::<u16>().ok().filter(|port| *port > 0);
    match text.split_once('-').map(|(first, last)| (port(first), port(last))) {
        Some((Some(first), Some(last))) if first <= last => Ok(first..=last),
        _ => Err(Error::new(Kind::BadInput, format!("'{text}' is not a range of ports"))
            .hint("write the first and the last port, as in '5500-5599'")),
    }
}

/// Checks `name:port`, `10.0.0.2:7420` or `[fd00::2]:7420`.
pub fn check_address(text: &str) -> Result<()> {
    let bad = || {
        Error::new(Kind::BadInput, format!("'{text}' is not an address with a port"))
            .hint("write it like 'db2.example.net:7420' or '10.0.0.2:7420'")
    };
    if text.parse::<std::net::SocketAddr>().is_ok_and(|address| address.port() > 0) {
        return Ok(());
    }
    let (name, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let name_is_good = (1..=253).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    if name_is_good && port.parse::<u16>().is_ok_and(|port| port > 0) { Ok(()) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_every_usual_unit_are_read() {
        let seconds = ["250ms", "5s", "10min", "12h", "7d", "2w", "1h 30min"]
            .map(|text| parse_duration(text).unwrap_or_else(|error| panic!("{text}: {error}")).as_secs_f64());
        assert_eq!(seconds, [0.25, 5.0, 600.0, 43200.0, 604800.0, 1209600.0, 5400.0]);
        for bad in ["", "5", "-5s", "1mo", "1y", "soon", "5 s ago"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_read_in_binary_and_decimal_units() {
        assert_eq!(parse_size("16GiB").unwrap(), 16 << 30);
        assert_eq!(parse_size("512 MiB").unwrap(), 512 << 20);
        assert_eq!(parse_size("100GB").unwrap(), 100_000_000_000);
        assert_eq!(parse_size("42").unwrap(), 42);
        for bad in ["", "GiB", "16gib", "1.5GiB", "-1", "99999999TiB", "16 G iB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_need_a_port() {
        for good in ["db2.example.net:7420", "10.0.0.2:7420", "[fd00::2]:7420", "localhost:1"] {
            check_address(good).unwrap();
        }
        for bad in ["db2", "db2:", ":7420", "db2:0", "db2:70000", "10.0.0.2:0", "db 2:7420", "fd00::2"] {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_range_of_ports_goes_upward() {
        assert_eq!(parse_ports("5500-5599").unwrap(), 5500..=5599);
        for bad in ["5500", "5599-5500", "0-10", "5500-70000", "a-b"] {
            assert!(parse_ports(bad).is_err(), "{bad}");
        }
    }
}
