//! Text tables: aligned columns, no line longer than the terminal.

use std::fmt::Write as _;

use anstyle::{AnsiColor, Style};

/// What the output may look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Colours may be used.
    pub colour: bool,
    /// Columns of the terminal; `None`: lines may be as long as they are.
    pub width: Option<usize>,
}

/// What a text means, so that colour can say it too. The words always say it alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    /// Nothing special.
    #[default]
    Plain,
    /// As it should be.
    Good,
    /// Worth a look.
    Warn,
    /// Wrong.
    Bad,
    /// Headings.
    Head,
    /// Less important.
    Faint,
}

/// A text and its tone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
}

/// A column: its heading, where its text stands, and whether it goes when the terminal is narrow (the highest first).
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// Heading.
    pub head: &'static str,
    /// Numbers stand right.
    pub right: bool,
    /// 0: always shown.
    pub expendable: u8,
}

#[derive(Debug)]
enum Line {
    Row(Vec<Cell>),
    Whole(Vec<Cell>),
}

/// A table in the making.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    lines: Vec<Line>,
    /// Spaces before each row; lines that are no rows have none.
    indent: usize,
}

/// Spaces between columns.
const GAP: usize = 2;

// === impl Cell ===

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Tone::Plain)
    }
}

impl Cell {
    /// A text with a tone. Control characters, which a name from outside may hold, become `?`.
    pub fn new(text: impl Into<String>, tone: Tone) -> Self {
        let text: String = text.into();
        let text = if text.contains(char::is_control) {
            text.replace(char::is_control, "?")
        } else {
            text
        };
        Self { text, tone }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

// === impl Column ===

impl Column {
    /// A column of words.
    pub const fn words(head: &'static str) -> Self {
        Self {
            head,
            right: false,
            expendable: 0,
        }
    }
    /// A column of numbers.
    pub const fn numbers(head: &'static str) -> Self {
        Self {
            head,
            right: true,
            expendable: 0,
        }
    }
    /// Goes when the terminal is narrow; columns with a higher `order` go first.
    pub const fn expendable(mut self, order: u8) -> Self {
        self.expendable = order;
        self
    }
}

// === impl Table ===

impl Table {
    /// An empty table.
    pub fn new(columns: &[Column], indent: usize) -> Self {
        Self {
            columns: columns.to_vec(),
            lines: Vec::new(),
            indent,
        }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: Vec<Cell>) {
        self.lines.push(Line::Row(cells));
    }

    /// Adds a line that stands across all columns, its parts two spaces apart.
    pub fn line(&mut self, parts: Vec<Cell>) {
        self.lines.push(Line::Whole(parts));
    }

    /// The heading as a row, wherever it is wanted.
    pub fn head(&mut self) {
        let heads = self
            .columns
            .iter()
            .map(|c| Cell::new(c.head, Tone::Head))
            .collect();
        self.lines.push(Line::Row(heads));
    }

    /// The text, with a newline after each line.
    pub fn render(&self, look: Look) -> String {
        let shown = self.shown(look);
        let mut text = String::new();
        for line in &self.lines {
            match line {
                Line::Whole(parts) => {
                    let parts: Vec<_> = parts.iter().map(|cell| (cell, 0, 0)).collect();
                    write_line(&mut text, 0, &parts, look);
                }
                Line::Row(cells) => {
                    let empty = Cell::default();
                    let parts: Vec<(&Cell, usize, usize)> = shown
                        .iter()
                        .map(|&(index, width)| {
                            let cell = cells.get(index).unwrap_or(&empty);
                            let space = width.saturating_sub(cell.width());
                            if self.columns[index].right {
                                (cell, space, 0)
                            } else {
                                (cell, 0, space)
                            }
                        })
                        .collect();
                    write_line(&mut text, self.indent, &parts, look);
                }
            }
        }
        text
    }

    /// Columns that fit, with their widths. The last one may be cut.
    fn shown(&self, look: Look) -> Vec<(usize, usize)> {
        let mut shown: Vec<(usize, usize)> = (0..self.columns.len()).map(|i| (i, self.width_of(i))).collect();
        // A column in which no row has anything says nothing.
        shown.retain(|&(index, _)| self.columns[index].expendable == 0 || self.has_content(index));
        while let Some(limit) = look.width {
            let needed = self.indent + shown.iter().map(|(_, width)| width + GAP).sum::<usize>();
            let victim = shown
                .iter()
                .enumerate()
                .filter(|(_, (index, _))| self.columns[*index].expendable > 0)
                .max_by_key(|(_, (index, _))| self.columns[*index].expendable)
                .map(|(place, _)| place);
            match victim {
                Some(place) if needed > limit + GAP => {
                    shown.remove(place);
                }
                _ => break,
            }
        }
        shown
    }

    fn cells(&self, column: usize) -> impl Iterator<Item = &Cell> {
        self.lines.iter().filter_map(move |line| match line {
            Line::Row(cells) => cells.get(column),
            Line::Whole(_) => None,
        })
    }

    fn width_of(&self, column: usize) -> usize {
        self.cells(column).map(Cell::width).max().unwrap_or(0)
    }

    fn has_content(&self, column: usize) -> bool {
        let head = self.columns[column].head;
        self.cells(column)
            .any(|c| c.tone != Tone::Head && !c.text.is_empty() && c.text != "-" && c.text != head)
    }
}

/// Writes cells with the spaces before and after each; cuts the line at the terminal's width.
fn write_line(out: &mut String, indent: usize, parts: &[(&Cell, usize, usize)], look: Look) {
    let last = parts.iter().rposition(|(cell, ..)| !cell.text.is_empty());
    let mut room = look.width.unwrap_or(usize::MAX).saturating_sub(indent);
    out.extend(std::iter::repeat_n(' ', indent));
    for (index, (cell, before, after)) in parts.iter().enumerate().take(last.map_or(0, |l| l + 1)) {
        let gap = if index == 0 { 0 } else { GAP } + before;
        if gap >= room {
            break;
        }
        room -= gap;
        out.extend(std::iter::repeat_n(' ', gap));
        let cut = cell.width() > room;
        let text: String = if cut {
            cell.text.chars().take(room - 1).chain(['…']).collect()
        } else {
            cell.text.clone()
        };
        let style = style(cell.tone);
        match look.colour && style != Style::new() {
            true => _ = write!(out, "{style}{text}{style:#}"),
            false => out.push_str(&text),
        }
        room -= text.chars().count();
        if cut {
            break;
        }
        let after = if Some(index) == last {
            0
        } else {
            (*after).min(room)
        };
        out.extend(std::iter::repeat_n(' ', after));
        room -= after;
    }
    out.push('\n');
}

fn style(tone: Tone) -> Style {
    match tone {
        Tone::Plain => Style::new(),
        Tone::Good => AnsiColor::Green.on_default(),
        Tone::Warn => AnsiColor::Yellow.on_default(),
        Tone::Bad => AnsiColor::Red.on_default().bold(),
        Tone::Head => Style::new().bold(),
        Tone::Faint => Style::new().dimmed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let columns = [
            Column::words("NAME"),
            Column::numbers("N").expendable(1),
            Column::words("WHY"),
        ];
        let mut table = Table::new(&columns, 1);
        table.line(vec![Cell::new("all", Tone::Head), "of them".into()]);
        table.head();
        table.row(vec![
            "a".into(),
            "12".into(),
            Cell::new("well enough", Tone::Good),
        ]);
        table.row(vec!["longer".into(), "3".into()]);
        table
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_space() {
        assert_eq!(
            table().render(Look::default()),
            "all  of them\n NAME     N  WHY\n a       12  well enough\n longer   3\n"
        );
    }

    #[test]
    fn a_narrow_terminal_loses_expendable_columns_then_text() {
        let narrow = |width| {
            table().render(Look {
                colour: false,
                width: Some(width),
            })
        };
        assert_eq!(
            narrow(20),
            "all  of them\n NAME    WHY\n a       well enough\n longer\n"
        );
        assert_eq!(narrow(12), "all  of them\n NAME    WHY\n a       we…\n longer\n");
        for width in 1..30 {
            assert!(
                narrow(width).lines().all(|l| l.chars().count() <= width.max(1)),
                "{width}"
            );
        }
    }

    #[test]
    fn colour_adds_only_escapes() {
        let coloured = table().render(Look {
            colour: true,
            width: None,
        });
        assert!(
            coloured.contains("\u{1b}[32mwell enough\u{1b}[0m"),
            "{coloured:?}"
        );
        assert!(!table().render(Look::default()).contains('\u{1b}'));
    }

    #[test]
    fn names_from_outside_cannot_send_escapes() {
        assert_eq!(Cell::from("a\u{1b}[31mb\n").text, "a?[31mb?");
    }
}
