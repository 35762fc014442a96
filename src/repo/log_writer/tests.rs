//! Unit tests of `log_writer`.

use super::*;
use crate::repo::test_site::{Site, holder, noise, ship, site};
use crate::store::faulty::{Fault, Operation, When};

fn kind_of<T>(result: Result<T>) -> Kind {
    result.err().unwrap().kind()
}

async fn read(site: &Site, file: &str) -> Bytes {
    site.reader().await.read(file, 0, 64 << 20).await.unwrap()
}

#[tokio::test]
async fn chunks_of_an_open_file_read_back_and_give_way_to_the_finished_file() {
    let site = site().await;
    let writer = site.writer().await;
    let content = noise(1, 3 << 20);
    ship(&writer, "f1", 0, &content[..10], false).await.unwrap();
    ship(&writer, "f1", 10, &content[10..2_000_000], false).await.unwrap();
    assert_eq!(site.log_keys().await, ["f1/000000000000-00000000000a", "f1/00000000000a-0000001e8480"]);
    assert_eq!(read(&site, "f1").await, content[..2_000_000]);

    let shipped = ship(&writer, "f1", 0, &content, true).await.unwrap();
    assert!(!shipped.was_there && shipped.stored_bytes > 3 << 20);
    assert_eq!(site.log_keys().await, ["f1/sealed"]);
    assert_eq!(read(&site, "f1").await, content);
    let reader = site.reader().await;
    for (from, length) in [(0, 1), (1 << 20, 5), ((1 << 20) - 3, 7), (3_000_000, 1 << 30), (3 << 20, 9)] {
        let expected = &content[from..content.len().min(from + length)];
        assert_eq!(reader.read("f1", from as u64, length).await.unwrap(), expected, "{from}+{length}");
    }
}

#[tokio::test]
async fn the_same_file_again_is_success_and_changes_nothing() {
    let site = site().await;
    let content = noise(1, 100_000);
    ship(&site.writer().await, "f1", 0, &content, true).await.unwrap();
    let before = site.read_object(&format!("incarnations/{}/log/f1/sealed", site.incarnation)).await;
    // One that knows of it, and one whose catalogue is older.
    let knowing = site.writer().await;
    assert!(ship(&knowing, "f1", 0, &content, true).await.unwrap().was_there);
    let older = LogWriter::new(site.repo.clone(), site.lease.clone(), knowing.catalogue().clone());
    assert!(ship(&older, "f1", 0, &content, true).await.unwrap().was_there);
    let after = site.read_object(&format!("incarnations/{}/log/f1/sealed", site.incarnation)).await;
    assert_eq!(before, after);
}

#[tokio::test]
async fn other_bytes_under_the_same_name_are_a_conflict_and_never_an_overwrite() {
    let site = site().await;
    let not_knowing = site.writer().await;
    let content = noise(1, 5 << 20);
    ship(&site.writer().await, "f1", 0, &content, true).await.unwrap();
    let knowing = site.writer().await;
    let mut other = content.clone();
    other[4_000_000] ^= 1;
    for writer in [&not_knowing, &knowing] {
        for bad in [&other[..], &content[..4_000_000], &other[..1]] {
            let error = ship(writer, "f1", 0, bad, true).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Conflict, "{error}");
            assert!(error.hint_text().unwrap().contains("new incarnation"));
        }
    }
    assert_eq!(read(&site, "f1").await, content);
}

#[tokio::test]
async fn bytes_for_a_file_that_is_finished_are_a_conflict() {
    let site = site().await;
    let writer = site.writer().await;
    ship(&writer, "f1", 0, b"whole", true).await.unwrap();
    assert_eq!(kind_of(ship(&writer, "f1", 5, b"more", false).await), Kind::Conflict);
}

#[tokio::test]
async fn a_put_whose_answer_was_lost_is_repeated_without_harm() {
    let site = site().await;
    let writer = site.writer().await;
    for operation in [1, 3] {
        site.faults.inject(Operation::PutStream, When::Nth(operation), Fault::AnswerLost);
    }
    assert_eq!(kind_of(ship(&writer, "f1", 0, b"abc", false).await), Kind::Unreachable);
    // There is more by now; the lost chunk stays beside the longer one.
    ship(&writer, "f1", 0, b"abcdef", false).await.unwrap();
    assert_eq!(read(&site, "f1").await, "abcdef");
    assert_eq!(kind_of(ship(&writer, "f1", 0, b"abcdefg", true).await), Kind::Unreachable);
    assert!(ship(&writer, "f1", 0, b"abcdefg", true).await.unwrap().was_there);
    assert_eq!(site.log_keys().await, ["f1/sealed"]);
    assert_eq!(read(&site, "f1").await, "abcdefg");
}

#[tokio::test]
async fn a_chunk_after_a_gap_is_refused_and_one_that_is_there_costs_nothing() {
    let site = site().await;
    let writer = site.writer().await;
    ship(&writer, "f1", 0, b"abc", false).await.unwrap();
    assert_eq!(kind_of(ship(&writer, "f1", 4, b"e", false).await), Kind::Internal);
    assert!(ship(&writer, "f1", 1, b"bc", false).await.unwrap().was_there);
    ship(&writer, "f1", 1, b"bcd", false).await.unwrap();
    assert_eq!(read(&site, "f1").await, "abcd");
}

#[tokio::test]
async fn nothing_is_stored_of_a_source_that_ends_early_or_late() {
    let site = site().await;
    let writer = site.writer().await;
    let chunk = |to_bytes| LogChunk { file: String::from("f1"), from_bytes: 0, to_bytes, sealed: true };
    struct Three(bool);
    impl LogBytes for Three {
        fn read(&mut self) -> Result<Bytes> {
            Ok(if std::mem::replace(&mut self.0, true) { Bytes::new() } else { Bytes::from_static(b"abc") })
        }
        fn summary(&self) -> LogSummary {
            LogSummary::default()
        }
    }
    assert_eq!(kind_of(writer.ship(chunk(4), Box::new(Three(false))).await), Kind::Damaged);
    assert_eq!(kind_of(writer.ship(chunk(2), Box::new(Three(false))).await), Kind::Internal);
    assert!(site.log_keys().await.is_empty());
    writer.ship(chunk(3), Box::new(Three(false))).await.unwrap();
}

#[tokio::test]
async fn nothing_is_stored_when_the_lease_is_lost_while_the_bytes_are_on_their_way() {
    let site = site().await;
    let writer = site.writer().await;
    struct LosesTheLease(Bytes, std::sync::mpsc::Receiver<()>);
    impl LogBytes for LosesTheLease {
        fn read(&mut self) -> Result<Bytes> {
            let piece = self.0.split_to(self.0.len().min(1 << 20));
            if self.0.is_empty() && !piece.is_empty() {
                self.1.recv().unwrap();
            }
            Ok(piece)
        }
        fn summary(&self) -> LogSummary {
            LogSummary::default()
        }
    }
    let (go_on, gate) = std::sync::mpsc::channel();
    let chunk = LogChunk { file: String::from("f1"), from_bytes: 0, to_bytes: 2 << 20, sealed: true };
    let source = Box::new(LosesTheLease(Bytes::from(noise(1, 2 << 20)), gate));
    let take_over = async {
        let ttl = std::time::Duration::from_secs(30);
        let clock = site.clock.clone();
        LeaseKeeper::acquire(site.repo.clone(), site.incarnation, holder(2), clock, ttl, |_| false).await.unwrap();
        assert_eq!(kind_of(site.lease.renew(None).await), Kind::Fenced);
        go_on.send(()).unwrap();
    };
    let (shipped, ()) = tokio::join!(writer.ship(chunk, source), take_over);
    assert_eq!(kind_of(shipped), Kind::Fenced);
    assert!(site.log_keys().await.is_empty());
}

#[tokio::test]
async fn chunks_that_could_not_be_deleted_do_no_harm() {
    let site = site().await;
    let writer = site.writer().await;
    ship(&writer, "f1", 0, b"ab", false).await.unwrap();
    site.faults.inject(Operation::Delete, When::First(1), Fault::Fail(Kind::Unreachable));
    ship(&writer, "f1", 0, b"abc", true).await.unwrap();
    assert_eq!(site.log_keys().await, ["f1/000000000000-000000000002", "f1/sealed"]);
    assert_eq!(read(&site, "f1").await, "abc");
    ship(&writer, "f1", 0, b"abc", true).await.unwrap();
    assert_eq!(site.log_keys().await, ["f1/sealed"]);
}

#[tokio::test]
async fn chunks_that_could_not_be_deleted_go_when_a_later_file_is_finished() {
    let site = site().await;
    let writer = site.writer().await;
    site.faults.inject(Operation::Delete, When::First(2), Fault::Fail(Kind::Unreachable));
    for (file, left) in [("f1", 3), ("f2", 6), ("f3", 3)] {
        ship(&writer, file, 0, b"a", false).await.unwrap();
        ship(&writer, file, 1, b"b", false).await.unwrap();
        ship(&writer, file, 0, b"abc", true).await.unwrap();
        assert_eq!(site.log_keys().await.len(), left, "{file}");
    }
    assert_eq!(site.log_keys().await, ["f1/sealed", "f2/sealed", "f3/sealed"]);
    assert_eq!(site.faults.calls(Operation::Delete), 5);
}

#[tokio::test]
async fn a_flipped_bit_anywhere_in_what_is_read_of_a_log_file_is_damage() {
    let site = site().await;
    ship(&site.writer().await, "f1", 0, b"some log, some more log", true).await.unwrap();
    let key = format!("incarnations/{}/log/f1/sealed", site.incarnation);
    let good = site.read_object(&key).await;
    // The head is looked at by nobody who knows the size: it is for people and for repair.
    for at in crate::format::container::HEAD_BYTES..good.len() {
        let mut bad = good.to_vec();
        bad[at] ^= 4;
        site.replace_object(&key, bad).await;
        let error = site.reader().await.read("f1", 0, 100).await.expect_err("a flipped bit was read");
        assert_eq!(error.kind(), Kind::Damaged, "{at}: {error}");
        assert!(error.message().contains(&key), "{error}");
    }
    for length in 0..good.len() {
        site.replace_object(&key, good[..length].to_vec()).await;
        assert_eq!(kind_of(site.reader().await.read("f1", 0, 100).await), Kind::Damaged, "{length}");
    }
}

#[tokio::test]
async fn a_reader_with_an_old_catalogue_finds_a_file_that_was_finished_meanwhile() {
    let site = site().await;
    let writer = site.writer().await;
    ship(&writer, "f1", 0, b"ab", false).await.unwrap();
    let reader = site.reader().await;
    assert_eq!(reader.read("f1", 0, 10).await.unwrap(), "ab");
    let fresh_reader = site.reader().await;
    ship(&writer, "f1", 0, b"abc", true).await.unwrap();
    assert_eq!(reader.read("f1", 0, 10).await.unwrap(), "abc");
    assert_eq!(fresh_reader.read("f1", 1, 10).await.unwrap(), "bc");
    assert_eq!(kind_of(reader.read("f2", 0, 10).await), Kind::NotFound);
}
