//! (floor 'job')
