//! (floor 'agent')
