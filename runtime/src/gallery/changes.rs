//! The gallery's list of changes, by which the search index knows what it has missed.
//!
//! Triggers keep it, so that whoever changes a picture, in whatever way, is in it. Each change has a number and a random token:
//! an index made at a change that is in the list, with that token, is a copy of this gallery as it then was, and what came
//! later in the list is all that it lacks. The list is cut at its old end; an index older than that is made anew.

use rusqlite::{Connection, OptionalExtension};

use super::index::Revision;

/// Changes that the list holds: reading so many pictures one by one takes as long as reading a million in order.
const KEPT: i64 = 100_000;

/// As SQLite stores them.
const TRIGGERS: [&str; 3] = [
    "CREATE TRIGGER picture_added AFTER INSERT ON pictures BEGIN \
     INSERT INTO changes (id, token) VALUES (NEW.id, random()); END",
    "CREATE TRIGGER picture_changed AFTER UPDATE ON pictures BEGIN \
     INSERT INTO changes (id, token) VALUES (OLD.id, random()); \
     INSERT INTO changes (id, token) SELECT NEW.id, random() WHERE NEW.id <> OLD.id; END",
    "CREATE TRIGGER picture_removed AFTER DELETE ON pictures BEGIN \
     INSERT INTO changes (id, token) VALUES (OLD.id, random()); END",
];

/// Begins a list, within a transaction. What an index knows of an earlier one counts no more.
pub(super) fn begin(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!(
        "DROP TRIGGER IF EXISTS picture_added;
         DROP TRIGGER IF EXISTS picture_changed;
         DROP TRIGGER IF EXISTS picture_removed;
         DROP TABLE IF EXISTS changes;
         CREATE TABLE changes (revision INTEGER PRIMARY KEY, id INTEGER, token INTEGER NOT NULL);
         INSERT INTO changes (token) VALUES (random());
         {};",
        TRIGGERS.join(";\n")
    ))
}

/// Begins a list where none is kept, within a transaction.
pub(super) fn keep(connection: &Connection) -> rusqlite::Result<()> {
    if are_kept(connection)? { Ok(()) } else { begin(connection) }
}

/// Whether the list is kept: galleries made by earlier versions have none, and somebody may have dropped a trigger.
pub(super) fn are_kept(connection: &Connection) -> rusqlite::Result<bool> {
    let mut statement =
        connection.prepare_cached("SELECT count(*) FROM sqlite_schema WHERE type = 'trigger' AND sql IN (?1, ?2, ?3)")?;
    let triggers: i64 = statement.query_row(TRIGGERS, |row| row.get(0))?;
    Ok(triggers == TRIGGERS.len() as i64)
}

/// Cuts the list, within a transaction that added to it.
pub(super) fn cut(connection: &Connection) -> rusqlite::Result<()> {
    let mut statement =
        connection.prepare_cached("DELETE FROM changes WHERE revision <= (SELECT max(revision) FROM changes) - ?1")?;
    statement.execute([KEPT]).map(drop)
}

/// The gallery's state.
pub(super) fn latest(connection: &Connection) -> rusqlite::Result<Option<Revision>> {
    connection
        .prepare_cached("SELECT revision, token FROM changes ORDER BY revision DESC LIMIT 1")?
        .query_row([], |row| Ok(Revision { number: row.get(0)?, token: row.get(1)? }))
        .optional()
}

/// Whether the gallery has been in this state, and the list still says what happened since.
pub(super) fn reach_back_to(connection: &Connection, revision: Revision) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM changes WHERE revision = ?1 AND token = ?2")?
        .exists([revision.number, revision.token])
}

/// The pictures that changed after a state, ascending.
pub(super) fn since(connection: &Connection, revision: Revision) -> rusqlite::Result<Vec<i64>> {
    let mut statement =
        connection.prepare_cached("SELECT DISTINCT id FROM changes WHERE revision > ?1 AND id IS NOT NULL ORDER BY id")?;
    statement.query_map([revision.number], |row| row.get(0))?.collect()
}
