//! Counts the memory that a thread has, in all tests of this binary, at the cost of two additions.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The usual allocator, counted.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    // Without a destructor and without memory of their own, so that they can be used in here.
    static HAS: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    // At the end of a thread there may be nothing to count with.
    let _ = HAS.try_with(|has| {
        has.set(has.get().wrapping_add(change));
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(has.get())));
    });
}

// SAFETY: everything is handed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the rules of the trait.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

/// What this thread has now; from here on the peak counts anew.
pub fn begin() -> isize {
    let now = HAS.with(Cell::get);
    PEAK.with(|peak| peak.set(now));
    now
}

/// The most that this thread had at a time since then, beyond what it had.
pub fn peak_since(before: isize) -> usize {
    usize::try_from(PEAK.with(Cell::get) - before).unwrap_or(0)
}
