//! (floor 'store')
