//! (floor 'format')
