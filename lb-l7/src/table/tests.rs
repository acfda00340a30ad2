use proptest::prelude::*;

use super::*;

fn table(entries: &[(&str, &str)]) -> Table<String> {
    Table::new(
        entries
            .iter()
            .map(|(host, path)| ((*host).into(), (*path).into(), format!("{host}{path}"))),
    )
}

fn found(table: &Table<String>, host: &str, path: &str) -> String {
    match table.find(host, path) {
        Found::This(what) => what.clone(),
        Found::NoPath => "no path".into(),
        Found::NoHost => "no host".into(),
    }
}

#[test]
fn the_most_exact_host_wins_and_then_the_longest_path() {
    let table = table(&[
        ("shop.example.com", "/"),
        ("shop.example.com", "/cart"),
        ("shop.example.com", "/cart/pay"),
        ("*.example.com", "/"),
        ("*.eu.example.com", "/"),
        ("api.example.com", "/v1"),
    ]);
    for (host, path, want) in [
        ("shop.example.com", "/", "shop.example.com/"),
        ("shop.example.com", "/carts", "shop.example.com/"),
        ("shop.example.com", "/cart", "shop.example.com/cart"),
        ("shop.example.com", "/cart/", "shop.example.com/cart"),
        ("shop.example.com", "/cart/pay/1", "shop.example.com/cart/pay"),
        ("blog.example.com", "/cart", "*.example.com/"),
        ("a.b.example.com", "/", "*.example.com/"),
        ("a.eu.example.com", "/", "*.eu.example.com/"),
        ("eu.example.com", "/", "*.example.com/"),
        // What the host itself does not have, the wildcard does.
        ("api.example.com", "/v1/x", "api.example.com/v1"),
        ("api.example.com", "/v2", "*.example.com/"),
        ("example.com", "/", "no host"),
        ("notexample.com", "/", "no host"),
    ] {
        assert_eq!(found(&table, host, path), want, "{host}{path}");
    }
}

#[test]
fn the_default_takes_what_nobody_else_does() {
    let table = table(&[("a.example.com", "/x"), ("*", "/")]);
    assert_eq!(found(&table, "a.example.com", "/x"), "a.example.com/x");
    assert_eq!(found(&table, "a.example.com", "/y"), "*/");
    assert_eq!(found(&table, "anything", "/"), "*/");
    let table = self::table(&[("a.example.com", "/x")]);
    assert_eq!(found(&table, "a.example.com", "/y"), "no path");
}

proptest! {
    /// Against the definition, by looking at every entry.
    #[test]
    fn the_table_finds_what_a_search_finds(
        entries in prop::collection::vec(("(\\*\\.)?[ab](\\.[ab]){0,3}|\\*", "(/[xy]){1,3}|/"), 0..20),
        host in "[ab](\\.[ab]){0,4}",
        path in "(/[xy]z?){0,4}/?",
    ) {
        let path = format!("/{}", path.trim_start_matches('/'));
        let owned: Vec<(&str, &str)> = entries.iter().map(|(h, p)| (h.as_str(), p.as_str())).collect();
        let table = table(&owned);
        let matches = |entry: &&(&str, &str)| {
            let host_fits = match entry.0.strip_prefix("*.") {
                Some(parent) => host.strip_suffix(parent).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
                None => entry.0 == "*" || entry.0 == host,
            };
            let path_fits = entry.1 == "/" || path == entry.1 || path.starts_with(&format!("{}/", entry.1));
            host_fits && path_fits
        };
        // Exact, then the longest wildcard, then the default; among those the longest path.
        let rank = |(h, p): &(&str, &str)| (*h == host, if *h == "*" { 0 } else { h.len() }, p.len());
        let best = owned.iter().filter(matches).max_by_key(|entry| rank(entry));
        match (table.find(&host, &path), best) {
            (Found::This(found), Some((h, p))) => prop_assert_eq!(found, &format!("{h}{p}")),
            (Found::NoPath | Found::NoHost, None) => {}
            (found, best) => prop_assert!(false, "{found:?} instead of {best:?}"),
        }
    }

    #[test]
    fn normalising_hosts_never_panics_and_is_stable(text in ".{0,40}") {
        if let Some(host) = host::normal(&text) {
            let again = host::normal(&host).map(std::borrow::Cow::into_owned);
            prop_assert_eq!(again, Some(host.clone().into_owned()));
        }
    }
}
