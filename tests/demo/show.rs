//! Plain text for people.

use std::{collections::BTreeMap, time::Instant};

use lb_tests::load::Report;

/// The width of the longest bar.
const BAR: u64 = 40;

/// A heading.
pub fn chapter(number: u32, title: &str) {
    let line = format!("{number}. {title}");
    println!("\n{line}\n{}\n", "=".repeat(line.chars().count()));
}

/// A paragraph, as it is written.
pub fn say(text: &str) {
    println!("{text}");
}

/// A command that is run now, as one would type it.
pub fn command(words: &str) {
    println!("  $ {words}");
}

/// Output of a command.
pub fn output(text: &str) {
    for line in text.lines() {
        println!("    {line}");
    }
}

/// How many requests each container answered.
pub fn bars(served: &BTreeMap<String, u64>) {
    let most = served.values().copied().max().unwrap_or(1).max(1);
    for (name, count) in in_order(served) {
        let bar = "#".repeat((count * BAR).div_ceil(most) as usize);
        println!("    {name:<8} {bar:<40} {count:>6}");
    }
}

/// `web-10` comes after `web-9`.
fn in_order(served: &BTreeMap<String, u64>) -> Vec<(&str, u64)> {
    let mut all: Vec<(&str, u64)> = served
        .iter()
        .map(|(name, count)| (name.as_str(), *count))
        .collect();
    all.sort_by_key(|(name, _)| (name.len(), *name));
    all
}

/// The head of the live table.
pub fn live_head() {
    println!(
        "    {:>7}  {:>10}  {:>9}  {:>6}  what happens",
        "time", "containers", "requests", "failed"
    );
}

/// A line of the live table.
pub fn live(start: Instant, containers: usize, report: &Report, what: &str) {
    println!(
        "    {:>5.1} s  {containers:>10}  {:>9}  {:>6}  {what}",
        start.elapsed().as_secs_f64(),
        grouped(report.total()),
        report.failures.len(),
    );
}

/// 12345 as 12,345.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
