//! (floor 'repo')
