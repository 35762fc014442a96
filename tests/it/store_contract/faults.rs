//! What happens when a store fails: what the injector does, and what a peer's store makes of it.

use keiki::store::PutCondition;
use keiki::store::read::{body_from_bytes, read_all, read_range};

use super::*;

async fn loaded(faults: &Faults) -> Fixture {
    let fixture = behind_faults(memory(), faults);
    fixture.store.put(&key("a"), noise(3_000_000, 1), PutCondition::Create).await.unwrap();
    fixture
}

async fn whole(store: &dyn Store) -> Bytes {
    read_all(store, &key("a"), 1 << 30).await.unwrap()
}

#[tokio::test]
async fn a_put_that_fails_leaves_the_old_object_and_one_whose_answer_is_lost_happened() {
    let faults = Faults::new();
    let fixture = loaded(&faults).await;
    faults.inject(Operation::Put, When::Nth(1), Fault::Fail(Kind::Full));
    faults.inject(Operation::Put, When::Nth(2), Fault::AnswerLost);
    faults.inject(Operation::PutStream, When::Every, Fault::CutBody(50));
    let outcome = fixture.store.put(&key("a"), noise(9, 2), PutCondition::Replace).await;
    assert_eq!(outcome.unwrap_err().kind(), Kind::Full);
    let streamed = fixture.store.put_stream(&key("a"), body_from_bytes(noise(99, 3)), PutCondition::Replace).await;
    assert_eq!(streamed.unwrap_err().kind(), Kind::Unreachable);
    assert_eq!(whole(&*fixture.store).await, noise(3_000_000, 1));
    let outcome = fixture.store.put(&key("a"), noise(9, 2), PutCondition::Replace).await;
    assert_eq!(outcome.unwrap_err().kind(), Kind::Unreachable);
    assert_eq!(whole(&*fixture.store).await, noise(9, 2));
    fixture.store.put(&key("a"), noise(9, 4), PutCondition::Replace).await.unwrap();
    assert_eq!((faults.calls(Operation::Put), faults.calls(Operation::PutStream)), (4, 1));
}

#[tokio::test]
async fn a_flipped_bit_and_a_cut_are_where_they_were_ordered_and_only_there() {
    let faults = Faults::new();
    let fixture = loaded(&faults).await;
    let body = noise(3_000_000, 1);
    faults.inject_for_key(Operation::Get, "a", When::Nth(1), Fault::FlipBit(2_000_000));
    faults.inject_for_key(Operation::Get, "a", When::Nth(2), Fault::CutBody(2_000_000));
    faults.inject_for_key(Operation::Get, "other", When::Every, Fault::Fail(Kind::Forbidden));
    let spoiled = whole(&*fixture.store).await;
    let wrong: Vec<usize> = (0..body.len()).filter(|at| spoiled[*at] != body[*at]).collect();
    assert_eq!((wrong.as_slice(), spoiled[2_000_000] ^ body[2_000_000]), ([2_000_000].as_slice(), 1));
    let cut = read_all(&*fixture.store, &key("a"), 1 << 30).await;
    assert_eq!(cut.unwrap_err().kind(), Kind::Unreachable);
    assert_eq!(whole(&*fixture.store).await, body);
}

#[tokio::test]
async fn a_broken_body_goes_on_at_the_byte_where_it_broke() {
    let faults = Faults::new();
    let fixture = through_peer(loaded(&faults).await);
    let body = noise(3_000_000, 1);
    faults.inject(Operation::Get, When::Every, Fault::CutBody(700_001));
    assert_eq!(whole(&*fixture.store).await, body);
    assert_eq!(faults.calls(Operation::Get), 5, "every byte is asked for once");
    let part = read_range(&*fixture.store, &key("a"), 1000..2_999_000).await.unwrap();
    assert_eq!(part, body.slice(1000..2_999_000));
}

#[tokio::test]
async fn a_body_that_never_goes_on_fails_in_the_end() {
    let faults = Faults::new();
    let fixture = through_peer(loaded(&faults).await);
    faults.inject(Operation::Get, When::Every, Fault::CutBody(0));
    let error = read_all(&*fixture.store, &key("a"), 1 << 30).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
    assert_eq!(faults.calls(Operation::Get), 40);
}

#[tokio::test]
async fn an_object_that_is_replaced_while_its_body_is_broken_is_refused() {
    use futures_util::StreamExt;
    let faults = Faults::new();
    let fixture = loaded(&faults).await;
    let peer = through_peer(Fixture { store: fixture.store.clone(), directory: None });
    faults.inject(Operation::Get, When::Nth(1), Fault::CutBody(1_500_000));
    let mut body = peer.store.get(&key("a"), None).await.unwrap();
    body.next().await.unwrap().unwrap();
    fixture.store.put(&key("a"), noise(3_000_000, 2), PutCondition::Replace).await.unwrap();
    let mut outcome = Ok(Bytes::new());
    while let Some(piece) = body.next().await {
        outcome = piece;
    }
    assert_eq!(outcome.unwrap_err().kind(), Kind::Conflict);
}

#[tokio::test]
async fn a_put_whose_answer_was_lost_is_known_as_our_own_and_a_foreign_one_is_not() {
    let faults = Faults::new();
    let fixture = through_peer(behind_faults(memory(), &faults));
    faults.inject(Operation::Put, When::First(1), Fault::AnswerLost);
    let tag = fixture.store.put(&key("lease"), noise(9, 1), PutCondition::Create).await.unwrap();
    assert_eq!(fixture.store.head(&key("lease")).await.unwrap().unwrap().tag, tag);
    // Nothing was lost: somebody else was there before, with the same bytes or not.
    for seed in [1, 2] {
        let outcome = fixture.store.put(&key("lease"), noise(9, seed), PutCondition::Create).await;
        assert_eq!(outcome.unwrap_err().kind(), Kind::Conflict);
    }
    for size in [9, 5, 20] {
        faults.inject(Operation::Put, When::First(1), Fault::Fail(Kind::Unreachable));
        let outcome = fixture.store.put(&key("lease"), noise(size, 3), PutCondition::Create).await;
        assert_eq!(outcome.unwrap_err().kind(), Kind::Conflict);
    }
    faults.inject(Operation::Put, When::First(1), Fault::AnswerLost);
    fixture.store.put(&key("lease"), noise(9, 5), PutCondition::IfMatch(tag)).await.unwrap();
}
