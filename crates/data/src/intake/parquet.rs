//! Parquet: a row is a document, its text in one column. FineWeb and what `datasets` writes: strings, compressed by snappy, zstd or gzip,
//! with a dictionary or not, nulls allowed. Where pages have checksums they are verified.
//!
//! What is held at once is a page of the column and a row: some hundred rows at once are as fast, and were gigabytes where each is a book.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;

use parquet::basic::{Compression, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::{Document, Documents, Found, SourceFile, Text, encoding, steps};
use crate::error::{DataError, Result};
use crate::guard::guarded;

/// Columns that are told where the one that is asked for is not there.
const TOLD: usize = 20;

/// A column that is being read.
struct Column {
    reader: ColumnReaderImpl<ByteArrayType>,
    /// A value at a lower level is null.
    present: i16,
}

/// Reads the rows of a file.
struct Rows<'a> {
    file: &'a SourceFile,
    field: &'a str,
    reader: Option<SerializedFileReader<File>>,
    column: Option<Column>,
    /// Row groups begun.
    groups: usize,
    /// Rows given of the last one.
    row: u64,
    /// How many the file says that it has.
    announced: u64,
    ended: bool,
    /// Whether a text in another encoding is passed over.
    folder: bool,
}

/// Refuses what this program does not decompress.
fn check_codec(codec: Compression) -> std::result::Result<(), String> {
    let name = match codec {
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_) | Compression::GZIP(_) => return Ok(()),
        Compression::LZ4 | Compression::LZ4_RAW => "LZ4",
        Compression::BROTLI(_) => "Brotli",
        Compression::LZO => "LZO",
    };
    Err(format!(
        "its column is compressed by {name}, expected zstd, snappy, gzip or nothing; write the file again \
         (pyarrow: pq.write_table(pq.read_table(FILE), NEW, compression=\"zstd\"))"
    ))
}

impl<'a> Rows<'a> {
    fn wrong(&self, what: impl std::fmt::Display) -> DataError {
        DataError::content(&self.file.path, format!("row group {}: {what}", self.groups))
    }

    /// The library's answer; where it panics the file is damaged in a way that it does not look for.
    fn ask<T>(&self, ask: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
        let damaged = |what: String| {
            let place = if self.groups == 0 { String::new() } else { format!("row group {}: ", self.groups) };
            DataError::content(&self.file.path, format!("{place}is damaged: {what}"))
        };
        match guarded(ask) {
            Ok(answer) => answer.map_err(|e| damaged(format!("{e}; bring it again"))),
            Err(_) => Err(damaged("its parts contradict each other; bring it again".into())),
        }
    }

    fn open(&mut self) -> Result<()> {
        let path = &self.file.path;
        let mut file = File::open(path).map_err(DataError::io(path, "cannot be read"))?;
        let mut head = Vec::new();
        file.by_ref().take(1 << 10).read_to_end(&mut head).map_err(DataError::io(path, "cannot be read"))?;
        if !head.is_empty() && !head.starts_with(encoding::PARQUET) {
            let what = match (encoding::known(&head), &head[..]) {
                (_, [b'P', b'A', b'R', b'E', ..]) => "is encrypted; write it again without".to_string(),
                (Some((name, remedy)), _) => format!("is {name}, no parquet file; {remedy}"),
                (None, _) => {
                    "is no parquet file, which begins with PAR1; bring the file that its name announces".into()
                }
            };
            return Err(DataError::content(path, what));
        }
        self.reader = Some(self.ask(|| SerializedFileReader::new(file))?);
        Ok(())
    }

    /// The text's column of the next row group; nothing behind the last.
    fn next_column(&mut self) -> Result<Option<Column>> {
        let reader = self.reader.as_ref().expect("is opened before the first row");
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        if self.groups == reader.num_row_groups() {
            return Ok(None);
        }
        let columns = schema.columns();
        let mut named = (0..columns.len()).filter(|&i| columns[i].path().string() == self.field);
        let Some(at) = named.next() else {
            let names: Vec<String> = columns.iter().take(TOLD).map(|c| c.path().string()).collect();
            let more = if columns.len() > TOLD { format!(", ... ({} in all)", columns.len()) } else { String::new() };
            let what = format!("has no column {:?} (data.field); it has {}{more}", self.field, names.join(", "));
            return Err(DataError::content(&self.file.path, what));
        };
        if named.next().is_some() {
            let what =
                format!("has several columns {:?} (data.field); give the one that is meant another name", self.field);
            return Err(DataError::content(&self.file.path, what));
        }
        if columns[at].max_rep_level() > 0 || columns[at].physical_type() != Type::BYTE_ARRAY {
            let what = format!("its column {:?} holds no texts (data.field names the column)", self.field);
            return Err(DataError::content(&self.file.path, what));
        }
        let present = columns[at].max_def_level();
        let group = self.groups;
        check_codec(reader.metadata().row_group(group).column(at).compression())
            .map_err(|what| DataError::content(&self.file.path, format!("row group {}: {what}", group + 1)))?;
        self.announced = u64::try_from(reader.metadata().row_group(group).num_rows()).unwrap_or(u64::MAX);
        let opened = self.ask(|| reader.get_row_group(group)?.get_column_reader(at))?;
        (self.groups, self.row) = (self.groups + 1, 0);
        match opened {
            ColumnReader::ByteArrayColumnReader(reader) => Ok(Some(Column { reader, present })),
            _ => Err(self.wrong("its column is of another type than the file says")),
        }
    }

    /// The next row's text, from this row group or the next; none is null. Nothing behind the last row.
    fn next(&mut self) -> Result<Option<Option<ByteArray>>> {
        loop {
            if self.column.is_none() {
                self.column = self.next_column()?;
            }
            let Some(mut column) = self.column.take() else { return Ok(None) };
            let mut values = Vec::new();
            // no level says that every row has a value
            let mut levels = Vec::new();
            let levels_of = (column.present > 0).then_some(&mut levels);
            let (rows, ..) = self.ask(|| column.reader.read_records(1, levels_of, None, &mut values))?;
            if rows > 0 {
                self.row += 1;
                self.column = Some(column);
                return Ok(Some(values.pop()));
            }
            if self.row != self.announced {
                let (found, announced) = (self.row, self.announced);
                let what = format!("is damaged: its column holds {found} of {announced} rows; bring it again");
                return Err(self.wrong(what));
            }
        }
    }

    fn step(&mut self) -> Result<Found<'a>> {
        if self.reader.is_none() {
            self.open()?;
        }
        let Some(row) = self.next()? else {
            self.ended = true;
            return Ok(Found::Read("parquet".into()));
        };
        let Some(bytes) = row else { return Ok(Found::LeftOut("null".into())) };
        match std::str::from_utf8(bytes.data()) {
            Ok(text) if text.trim().is_empty() => Ok(Found::LeftOut("empty".into())),
            Ok(text) => Ok(Found::Document(Document {
                source: Cow::Borrowed(&self.file.name),
                text: Text::Whole(Cow::Owned(text.to_string())),
                validation: None,
            })),
            Err(_) if self.folder => Ok(Found::LeftOut("row that is not UTF-8".into())),
            Err(e) => {
                let (row, at) = (self.row, e.valid_up_to());
                Err(self.wrong(format!("row {row}: byte {at} of its text is not valid UTF-8")))
            }
        }
    }
}

/// The documents of a file, from this column. In a folder, a row that is not UTF-8 is left out.
pub(super) fn documents<'a>(file: &'a SourceFile, field: &'a str, folder: bool) -> Documents<'a> {
    let mut rows =
        Rows { file, field, reader: None, column: None, groups: 0, row: 0, announced: 0, ended: false, folder };
    steps(move || (!rows.ended).then(|| rows.step()))
}

#[cfg(test)]
mod tests;
