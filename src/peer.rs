//! (floor 'peer')
