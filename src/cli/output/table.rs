//! Tables without lines: columns that a person can read and `awk` can split.

use comfy_table::{ContentArrangement, Table, presets};

/// A table with these headings, two spaces between columns, no borders. Widths follow the content, not the terminal,
/// when the output is not a terminal.
pub fn print(headings: &[&str], rows: Vec<Vec<String>>) {
    println!("{}", render(headings, rows));
}

/// The text of such a table, without trailing blanks.
pub fn render(headings: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings.iter().map(|heading| heading.to_string()));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_string()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::render;

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_blanks() {
        let text = render(&["NAME", "PORT"], vec![vec!["orders".into(), "5432".into()], vec!["b".into(), "1".into()]]);
        assert_eq!(text, "NAME    PORT\norders  5432\nb       1");
    }
}
