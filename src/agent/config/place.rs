//! From a place in the text of the configuration to the words for it: line and key.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::raw::RawConfig;
use crate::base::words::nearest;
use crate::error::{Error, Kind, Result};

/// Reads the text as keys and types; what they mean is checked later.
pub fn deserialize(text: &str) -> Result<RawConfig> {
    let tree = DeTable::parse(text).map_err(|error| not_toml(text, &error))?;
    toml::from_str(text).map_err(|error| {
        // Other keys of an unsupported repository are unknown as well, and are not what is wrong with it.
        if let Some(url) = tree.get_ref().get("repository").and_then(|table| table.get_ref().get("url"))
            && let Some(url_text) = url.get_ref().as_str().filter(|url| !is_known_url(url))
        {
            return unknown_url(url_text).while_doing(describe(text, url.span()));
        }
        wrong_shape(text, &error)
    })
}

fn is_known_url(url: &str) -> bool {
    ["file://", "peer://", "s3://"].iter().any(|scheme| url.starts_with(scheme))
}

/// What to say about the URL of a repository of no known kind.
pub fn unknown_url(url: &str) -> Error {
    let hint = "use 's3://BUCKET/PREFIX', 'file:///srv/keiki' (a directory, a mounted share) or 'peer://HOST' (through \
                another agent)";
    Error::new(Kind::BadInput, format!("'{url}' is not the URL of a repository")).hint(hint)
}

/// `line 12, key 'instance.ship_every'`.
pub fn describe(text: &str, span: Range<usize>) -> String {
    let line = line_of(text, span.start);
    match DeTable::parse(text).ok().and_then(|tree| key_at(tree.get_ref(), span.start)) {
        Some(key) => format!("line {line}, key '{key}'"),
        None => format!("line {line}"),
    }
}

/// Counts from 1.
pub fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The dotted name of the innermost key whose name or value covers the offset.
fn key_at(table: &DeTable<'_>, offset: usize) -> Option<String> {
    let mut found: Option<(usize, String)> = None;
    visit(table, "", &mut |span, key| {
        if span.contains(&offset) && found.as_ref().is_none_or(|(length, _)| span.len() <= *length) {
            found = Some((span.len(), key.to_string()));
        }
    });
    found.map(|(_, key)| key)
}

pub fn visit(table: &DeTable<'_>, prefix: &str, see: &mut dyn FnMut(Range<usize>, &str)) {
    for (name, value) in table.iter() {
        let key = if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
        see(name.span(), &key);
        see(value.span(), &key);
        match value.get_ref() {
            DeValue::Table(inner) => visit(inner, &key, see),
            DeValue::Array(items) => {
                for item in items.iter() {
                    see(item.span(), &key);
                    if let DeValue::Table(inner) = item.get_ref() {
                        visit(inner, &key, see);
                    }
                }
            }
            _ => {}
        }
    }
}

fn not_toml(text: &str, error: &toml::de::Error) -> Error {
    let line = line_of(text, error.span().map_or(0, |span| span.start));
    let wrong = Error::new(Kind::BadInput, format!("line {line}: {}", plain(error.message())));
    if error.message().starts_with("duplicate") {
        return wrong.hint("a [section] can stand there once, a [[section]] as often as there are such things");
    }
    wrong.hint(
        "a line is 'key = value' with text in double quotes, or a [section]; the sample 'config/keiki.toml' shows all",
    )
}

/// A key that is not known or missing, or a value of the wrong type.
fn wrong_shape(text: &str, error: &toml::de::Error) -> Error {
    let span = error.span().unwrap_or(0..0);
    let message = error.message();
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let mut words = quoted(rest);
        let unknown = words.next().unwrap_or_default();
        let known: Vec<&str> = words.collect();
        let hint = match nearest(unknown, known.iter().copied()) {
            Some(meant) => format!("did you mean '{meant}'?"),
            None => format!("known here: {}", known.join(", ")),
        };
        return Error::new(Kind::BadInput, format!("{}: there is no such key", describe(text, span))).hint(hint);
    }
    if let Some(rest) = message.strip_prefix("missing field ") {
        let missing = quoted(rest).next().unwrap_or_default();
        let section = DeTable::parse(text).ok().and_then(|tree| key_at(tree.get_ref(), span.start));
        return match section {
            Some(section) if span.end > 0 && span.len() < text.trim_end().len() => Error::new(
                Kind::BadInput,
                format!("line {}, section '{section}': key '{missing}' is missing", line_of(text, span.start)),
            ),
            _ => Error::new(Kind::BadInput, format!("section '{missing}' is missing")),
        };
    }
    Error::new(Kind::BadInput, format!("{}: {}", describe(text, span), plain(message)))
}

/// The words that serde puts in backticks.
pub fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The words of a library in the shape of ours.
fn plain(message: &str) -> String {
    let message = message
        .replace('`', "'")
        .replace("expected a string", "expected text in double quotes")
        .replace("expected i64", "expected a whole number")
        .replace("expected f64", "expected a number")
        .replace("invalid type: ", "this is a ")
        .replace("this is a integer", "this is an integer");
    let mut letters = message.trim_end_matches('.').chars();
    match letters.next() {
        Some(first) => first.to_lowercase().collect::<String>() + letters.as_str(),
        None => String::from("it cannot be read"),
    }
}
