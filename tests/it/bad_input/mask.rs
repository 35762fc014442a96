//! Takes out of a text what differs from run to run, so that the rest can be kept.

/// What is known to differ, and by which words it is shown.
#[derive(Default)]
pub struct Mask {
    known: Vec<(String, &'static str)>,
    keeps_numbers: bool,
}

impl Mask {
    /// Numbers stay as they are.
    pub fn keep_numbers(mut self) -> Mask {
        self.keeps_numbers = true;
        self
    }

    /// Shows `text` as `word`.
    pub fn known(mut self, text: impl ToString, word: &'static str) -> Mask {
        self.known.push((text.to_string(), word));
        // A path before the paths that it begins with.
        self.known.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        self
    }

    /// The text with known things under their words, and numbers, ids, times and sizes under general ones.
    pub fn hide(&self, text: &str) -> String {
        let mut text = text.to_string();
        for (known, word) in &self.known {
            text = text.replace(known, word);
        }
        if self.keeps_numbers {
            return text;
        }
        let mut text = hide_numbers(&hide_ids(&text));
        for (shown, word) in [
            ("N-N-N N:N:N.N", "TIME"),
            ("N-N-N N:N:N", "TIME"),
            ("N-N-N", "DATE"),
            ("N@N/N", "POSITION"),
            ("N/N", "LSN"),
        ] {
            text = text.replace(shown, word);
        }
        for unit in ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
            for number in ["N.N", "N"] {
                for end in [" ", ",", "\n"] {
                    text = text.replace(&format!("{number} {unit}{end}"), &format!("SIZE{end}"));
                }
            }
        }
        text
    }
}

/// Ids of jobs and incarnations: 8-4-4-4-12 hexadecimal digits. Ids of backups: a time and four letters.
fn hide_ids(text: &str) -> String {
    let is_uuid = |word: &str| {
        word.len() == 36
            && word.bytes().enumerate().all(|(at, byte)| match at {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            })
    };
    let is_backup =
        |word: &str| word.len() == 21 && word.as_bytes()[8] == b'T' && &word[15..17] == "Z-" && word.starts_with("20");
    words(
        text,
        |byte| byte.is_ascii_alphanumeric() || byte == b'-',
        |word, _| {
            if is_uuid(word) {
                Some("ID".to_string())
            } else if is_backup(word) {
                Some("BACKUP".to_string())
            } else {
                None
            }
        },
    )
}

/// Words that begin with a digit or are hexadecimal with a digit in them, and the second half of a log position.
fn hide_numbers(text: &str) -> String {
    words(
        text,
        |byte| byte.is_ascii_alphanumeric(),
        |word, before| {
            let is_hexadecimal = word.bytes().all(|byte| byte.is_ascii_hexdigit());
            let has_digit = word.bytes().any(|byte| byte.is_ascii_digit());
            let is_position = before.ends_with("N/") && is_hexadecimal && !word.bytes().any(|b| b.is_ascii_lowercase());
            let is_number = word.as_bytes()[0].is_ascii_digit() || (is_hexadecimal && has_digit) || is_position;
            is_number.then(|| "N".to_string())
        },
    )
}

/// Replaces the words for which `change` gives another; it also sees what was written so far.
fn words(text: &str, is_part: impl Fn(u8) -> bool, change: impl Fn(&str, &str) -> Option<String>) -> String {
    let mut written = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        let length = rest.bytes().take_while(|byte| is_part(*byte)).count();
        if length == 0 {
            let next = rest.chars().next().map_or(0, char::len_utf8);
            written.push_str(&rest[..next]);
            rest = &rest[next..];
            continue;
        }
        let (word, after) = rest.split_at(length);
        match change(word, &written) {
            Some(other) => written.push_str(&other),
            None => written.push_str(word),
        }
        rest = after;
    }
    written
}

#[test]
fn what_differs_from_run_to_run_is_masked_and_the_words_stay() {
    let mask = Mask::default().known("/tmp/lab", "LAB").known("/tmp/lab/clones", "CLONES");
    let text = "cannot clone 'orders' to 2026-11-21 09:59:00.25Z: '/tmp/lab/clones/b' has 1.5 GiB free, 20 B, job \
                0199e1ac-aaaa-bbbb-cccc-abcdefabcdef, backup '20261121T095900Z-kaxq' at 1@0/AB, not '0/2000A8' on 2026-11-21";
    assert_eq!(
        mask.hide(text),
        "cannot clone 'orders' to TIME: 'CLONES/b' has SIZE free, SIZE, job ID, backup 'BACKUP' at POSITION, not 'LSN' on DATE"
    );
}
