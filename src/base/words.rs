//! Words that were typed, and those that were meant.

/// The known word that was most likely meant: at most a third of its letters differ.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (edit_distance(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .min()
        .map(|(_, candidate)| candidate)
}

/// The known words that are nearest, the nearest first, at most `count`, however far they are.
pub fn nearest_few<'a>(word: &str, known: impl IntoIterator<Item = &'a str>, count: usize) -> Vec<&'a str> {
    let mut rows: Vec<(usize, &str)> = known.into_iter().map(|known| (edit_distance(word, known), known)).collect();
    rows.sort_unstable();
    rows.into_iter().take(count).map(|(_, known)| known).collect()
}

/// How many letters must be put in, left out or exchanged to make one word of the other (Levenshtein distance).
fn edit_distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (line, left_letter) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, right_letter) in right.iter().enumerate() {
            let exchanged = diagonal + usize::from(left_letter != *right_letter);
            diagonal = row[column + 1];
            row[column + 1] = exchanged.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_that_was_meant_is_found() {
        let known = ["ship", "ship_every", "data_dir", "port"];
        assert_eq!(nearest("ship_evry", known), Some("ship_every"));
        assert_eq!(nearest("datadir", known), Some("data_dir"));
        assert_eq!(nearest("wal_level", known), None);
        assert_eq!(nearest_few("ports", known, 2), ["port", "ship"]);
    }
}
