//! Unit tests of `log_catalogue`.

use super::*;
use crate::model::position::Position;
use crate::repo::test_site::{ship, ship_with, site};
use crate::store::faulty::Operation;
use proptest::prelude::*;

fn listed(name: &str, bytes: Option<u64>) -> ListedLogFile {
    ListedLogFile { name: name.to_string(), sealed: bytes.is_none(), bytes }
}

#[tokio::test]
async fn the_writers_own_catalogue_needs_no_listing() {
    let site = site().await;
    let writer = site.writer().await;
    let before = site.faults.calls(Operation::List);
    for number in 0..20 {
        ship(&writer, &format!("f{number:02}"), 0, b"abcd", true).await.unwrap();
    }
    ship(&writer, "f20", 0, b"ab", false).await.unwrap();
    assert_eq!(site.faults.calls(Operation::List), before);
    assert_eq!(writer.catalogue().files(), site.catalogue().await.files());
    assert_eq!(writer.catalogue().files().len(), 21);
    let file = writer.catalogue().file("f07").await.unwrap().unwrap();
    assert_eq!((file.bytes, file.sealed), (4, true));
    assert_eq!(writer.catalogue().file("f99").await.unwrap(), None);
}

#[tokio::test]
async fn a_refresh_sees_everything_new_and_does_not_list_everything() {
    let site = site().await;
    let writer = site.writer().await;
    for number in 0..200 {
        ship(&writer, &format!("f{number:03}"), 0, b"a", number != 5).await.unwrap();
    }
    let other = site.catalogue().await;
    // Filled in late, a straggler finished, a companion that sorts before its file, new ones.
    for (name, sealed) in [("f005", true), ("f199.partial", true), ("f200", true), ("f201", false)] {
        ship(&writer, name, 0, b"a", sealed).await.unwrap();
    }
    other.refresh().await.unwrap();
    assert_eq!(other.files(), site.catalogue().await.files());
    ship(&writer, "f201", 0, b"ab", true).await.unwrap();
    other.refresh().await.unwrap();
    assert_eq!(other.files(), site.catalogue().await.files());
    let (after, stragglers) = refresh_from(&other.lock().files);
    assert!(after.unwrap().as_str() > "f100" && stragglers.is_empty());
}

#[tokio::test]
async fn what_is_shipped_while_a_listing_is_under_way_is_not_forgotten_with_it() {
    let site = site().await;
    let writer = site.writer().await;
    let catalogue = writer.catalogue();
    let listing = Listing::begin(catalogue);
    let page = catalogue.list(&layout::log_prefix(site.incarnation), None).await.unwrap();
    ship(&writer, "f1", 0, b"a", true).await.unwrap();
    catalogue.lock().merge(page, |_| true);
    drop(listing);
    assert_eq!(catalogue.files(), [listed("f1", None)]);
    assert!(catalogue.lock().noted.is_empty());
}

#[tokio::test]
async fn a_gap_ends_what_is_contiguous() {
    let site = site().await;
    let catalogue = site.catalogue().await;
    let chunks = [(0, 4), (2, 6), (0, 2), (6, 7), (8, 9)];
    let mut parts = FileParts::default();
    chunks.iter().for_each(|(from, to)| parts.add(LogPart::Chunk { from: *from, to: *to }, 100));
    catalogue.lock().files.insert(String::from("f"), parts);
    assert_eq!(catalogue.files(), [listed("f", Some(7))]);
    let pieces = catalogue.pieces("f").unwrap();
    let ranges: Vec<_> = pieces.iter().map(|piece| piece.part).collect();
    assert_eq!(ranges, [(0, 4), (2, 6), (6, 7)].map(|(from, to)| LogPart::Chunk { from, to }));
}

#[tokio::test]
async fn the_summary_of_an_open_file_is_that_of_its_chunks_together() {
    let site = site().await;
    let writer = site.writer().await;
    let at = |second| Timestamp::from_second(second).unwrap();
    let summary = |first, last, name: &str| LogSummary {
        first_commit_at: Some(at(first)),
        last_commit_at: Some(at(last)),
        last_commit: Some(Position::Count(last as u64)),
        named_points: vec![(name.to_string(), Position::Count(first as u64))],
        transactions: vec![format!("{first}..{last}")],
    };
    ship_with(&writer, "f1", 0, b"ab", false, summary(5, 9, "x")).await.unwrap();
    ship_with(&writer, "f1", 2, b"c", false, LogSummary::default()).await.unwrap();
    ship_with(&writer, "f1", 3, b"d", false, summary(7, 12, "y")).await.unwrap();
    for catalogue in [site.catalogue().await, writer.catalogue().clone()] {
        let all = catalogue.summary("f1").await.unwrap();
        assert_eq!((all.first_commit_at, all.last_commit_at), (Some(at(5)), Some(at(12))));
        assert_eq!(all.last_commit, Some(Position::Count(12)));
        assert_eq!(all.named_points.len(), 2);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn the_search_by_time_agrees_with_looking_at_every_file(
        lasts in proptest::collection::vec(proptest::option::of(0..20i64), 0..12),
        at in 0..22i64,
    ) {
        // Commit times of a log rise from file to file.
        let mut highest = 0;
        let lasts: Vec<Option<i64>> = lasts.into_iter().map(|last| last.map(|step| {
            highest += step / 4;
            highest
        })).collect();
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let site = site().await;
            let writer = site.writer().await;
            let mut names = Vec::new();
            for (number, last) in lasts.iter().enumerate() {
                let last_commit_at = last.map(|second| Timestamp::from_second(second).unwrap());
                let summary = LogSummary { first_commit_at: last_commit_at, last_commit_at, ..LogSummary::default() };
                names.push(format!("f{number:02}"));
                ship_with(&writer, &names[number], 0, b"x", true, summary).await.unwrap();
            }
            let expected = lasts.iter().position(|last| last.is_some_and(|last| last > at)).unwrap_or(names.len());
            let at = Timestamp::from_second(at).unwrap();
            let found = writer.catalogue().first_with_commit_after(&names, at).await.unwrap();
            prop_assert_eq!(found, expected);
            Ok(())
        })?;
    }
}
