//! An error on the terminal: `error:` with what, to what and why, and `hint:` with what to do.

use crate::cli::output::json;
use crate::error::Error;

/// Prints to standard error, as text or as one JSON object.
pub fn print(error: &Error, as_json: bool) {
    if as_json {
        eprintln!("{}", json::error(error));
    } else {
        anstream::eprintln!("{}", text(error));
    }
}

/// The two lines, with colour codes that `anstream` removes where they do not belong.
pub fn text(error: &Error) -> String {
    let red = anstyle::AnsiColor::Red.on_default().bold();
    let mut lines = format!("{red}error:{red:#} {}", error.message());
    if let Some(hint) = error.hint_text() {
        let cyan = anstyle::AnsiColor::Cyan.on_default().bold();
        lines.push_str(&format!("\n{cyan}hint:{cyan:#} {hint}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn an_error_has_two_lines_that_say_what_to_do() {
        let error =
            Error::new(Kind::NotFound, "cannot clone 'orders': no such instance").hint("'keiki instances' lists them");
        let plain = anstream::adapter::strip_str(&text(&error)).to_string();
        assert_eq!(plain, "error: cannot clone 'orders': no such instance\nhint: 'keiki instances' lists them");
    }
}
