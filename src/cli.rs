//! (floor 'cli')
