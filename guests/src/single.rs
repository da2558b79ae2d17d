//! Answers: how does a program of one processor keep global state?

use core::cell::UnsafeCell;

/// A global that only the one processor of this program uses.
///
/// [`get`](Self::get) hands out a raw pointer: whoever dereferences it argues that no other
/// reference is live. The program starts no other processor and takes no interrupt; the only
/// asynchronous entry is an exception, whose handler touches [`traps`](crate::traps) alone.
pub struct Single<T>(UnsafeCell<T>);

// SAFETY: the program runs on one processor and starts no other.
unsafe impl<T> Sync for Single<T> {}

impl<T> Single<T> {
    /// Wraps `value`.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The address of the value.
    pub const fn get(&self) -> *mut T {
        self.0.get()
    }
}
