package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Compacting writes all rows into a new file, which then takes the old one's name.
// The writer does it, some rows at a time between other changes, as bbolt.Compact
// would in one go: so nobody waits for it. A row that is written after it was
// copied is copied again, and in the last part nothing else can be written until
// the new file is the one in use.
//
// The new file is locked before it has the name, and the old one until it has it
// no more, so another process finds the database in use at any time; one that was
// waiting for the old one's lock notices that the name is another file's by then,
// see openFile. A crash leaves the old file or the new one, either complete. What
// else is left Open removes.

const (
	// A part has so many rows or so many bytes.
	copyRows  = 2000
	copyBytes = 1 << 20
	// lastRows is how many rows the last part may have to copy again.
	lastRows = 200
	// maxTouched is how many rows may have to be copied again, at most.
	maxTouched = 100_000
	// copyFill leaves some room in each page for the next changes.
	copyFill = 0.9
	// copyReserve is how much room on the disk is left for others.
	copyReserve = 16 << 20
	// compactRetry is the wait after one that failed, for want of room perhaps.
	compactRetry = 10 * time.Minute
	// replacedRetry is how often is looked whether a replaced file is still read.
	replacedRetry = 100 * time.Millisecond
)

// compaction is a new file that is being written.
type compaction struct {
	path    string
	db      *bolt.DB
	file    *os.File // db's
	buckets [][]byte // all, in order
	current int      // the one that is being copied
	after   []byte   // its last row that was
	touched map[touchedRow]struct{}
	// tooMany: there were more than maxTouched.
	tooMany bool
}

type touchedRow struct{ bucket, key string }

func leftoverPath(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".compact")
}

// removeLeftover removes what a compaction has left that a crash has ended. The
// database is locked.
func (s *Store) removeLeftover() {
	if err := os.Remove(leftoverPath(s.cfg.Path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.cfg.Logger.Warn("what is left of a compaction can't be removed", "error", err)
	}
}

// compact does the next part.
func (s *Store) compact() (err error) {
	if s.upkeep.copy == nil {
		s.upkeep.copy, err = s.beginCopy()
		return err
	}
	defer func() {
		if err != nil {
			s.upkeep.discard(s.cfg.Logger)
		}
	}()
	c := s.upkeep.copy
	if c.tooMany {
		return errors.New("too much has changed while the database was compacted")
	}
	last := c.current == len(c.buckets) && len(c.touched) <= lastRows
	err = s.step(stepCopy, func() error {
		return s.view(func(src *bolt.Tx) error {
			return c.db.Update(func(dst *bolt.Tx) error {
				if c.current < len(c.buckets) {
					return c.copyRows(src, dst)
				}
				return c.copyTouched(src, dst, last)
			})
		})
	})
	if err != nil || !last {
		return err
	}
	return s.replace(c)
}

// step does a step, guarded.
func (s *Store) step(name string, do func() error) error {
	return guard(func() error {
		return s.cfg.Around(s.life, name, func(context.Context) error { return do() })
	})
}

// beginCopy makes the new file, unless the disk has no room for it.
func (s *Store) beginCopy() (c *compaction, err error) {
	s.removeLeftover()
	var size int64
	c = &compaction{path: leftoverPath(s.cfg.Path), touched: map[touchedRow]struct{}{}}
	err = s.view(func(tx *bolt.Tx) error {
		size = tx.Size()
		return tx.ForEach(func(name []byte, _ *bolt.Bucket) error {
			c.buckets = append(c.buckets, slices.Clone(name))
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(filepath.Dir(s.cfg.Path), &disk); err != nil {
		return nil, err
	}
	if free := int64(disk.Bavail) * disk.Bsize; free < size+copyReserve {
		return nil, fmt.Errorf("%w: compacting the database needs %d bytes, there are %d", ErrDiskFull, size+copyReserve, free)
	}
	c.db, c.file, err = openBolt(c.path, false, os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// copyRows copies the next rows.
func (c *compaction) copyRows(src, dst *bolt.Tx) error {
	rows, size := 0, 0
	for ; c.current < len(c.buckets); c.current, c.after = c.current+1, nil {
		name := c.buckets[c.current]
		to, err := dst.CreateBucketIfNotExists(name)
		if err != nil {
			return err
		}
		to.FillPercent = copyFill
		from := src.Bucket(name)
		cursor := from.Cursor()
		var last []byte
		for k, v := cursor.Seek(append(c.after, 0)); k != nil; k, v = cursor.Next() {
			if rows == copyRows || size >= copyBytes {
				c.after = slices.Clone(last)
				return nil
			}
			if err := to.Put(k, v); err != nil {
				return err
			}
			last = k
			rows++
			size += len(k) + len(v)
		}
	}
	return nil
}

// touch takes note of a row that was written: it has to be copied again, if it was
// copied.
func (c *compaction) touch(bucket, key []byte) {
	if c.current < len(c.buckets) {
		order := bytes.Compare(bucket, c.buckets[c.current])
		if order > 0 || order == 0 && bytes.Compare(key, c.after) > 0 {
			return
		}
	}
	if len(c.touched) == maxTouched {
		c.tooMany = true
		return
	}
	c.touched[touchedRow{string(bucket), string(key)}] = struct{}{}
}

// copyTouched copies rows again; the last ones make the file complete.
func (c *compaction) copyTouched(src, dst *bolt.Tx, last bool) error {
	size := 0
	for row := range c.touched {
		if size >= copyBytes && !last {
			break
		}
		from, to := src.Bucket([]byte(row.bucket)), dst.Bucket([]byte(row.bucket))
		var err error
		if v := from.Get([]byte(row.key)); v != nil {
			err = to.Put([]byte(row.key), v)
			size += len(v)
		} else {
			err = to.Delete([]byte(row.key))
		}
		if err != nil {
			return err
		}
		delete(c.touched, row)
	}
	if !last {
		return nil
	}
	return dst.Bucket(bucketMeta).Delete(metaCompact)
}

// replace gives the new file, which is complete, the name of the old one, and has
// it in use from then on.
func (s *Store) replace(c *compaction) error {
	err := s.step(stepRename, func() error { return os.Rename(c.path, s.cfg.Path) })
	opened, statError := c.file.Stat()
	if statError != nil {
		return errors.Join(err, statError)
	}
	if named, statError := os.Stat(s.cfg.Path); statError != nil || !os.SameFile(opened, named) {
		return errors.Join(err, statError)
	}
	s.renamed = true
	old, oldFile, before := s.db, s.file, opened.Size()
	if info, err := oldFile.Stat(); err == nil {
		before = info.Size()
	}
	s.pageSize = c.db.Info().PageSize
	stuck := s.useFile(c.db, c.file)
	s.upkeep = upkeep{}
	s.replaced.files = append(s.replaced.files, replacedFile{old, oldFile, stuck})
	s.closeReplaced()
	s.cfg.Logger.Info("the database is compacted: nothing is left of the older data keys", "bytes_before", before, "bytes_after", opened.Size())
	return s.keepName()
}

// replaced are files that others have taken the place of. The last readers of one
// may be at work for a while. bbolt would wait for them with a lock held that each
// reader who is done before them needs as well: so they are waited for first.
type replaced struct {
	files []replacedFile
	ready <-chan time.Time // when to look again; nil: there are none
}

type replacedFile struct {
	db    *bolt.DB
	file  *os.File
	stuck bool // bbolt can't close it
}

// closeReplaced closes those files that nobody reads any more.
func (s *Store) closeReplaced() {
	r := &s.replaced
	r.files = slices.DeleteFunc(r.files, func(f replacedFile) bool {
		done := f.stuck || f.db.Stats().OpenTxN == 0
		if done {
			f.close()
		}
		return done
	})
	switch {
	case len(r.files) > 0:
		r.ready = time.After(replacedRetry)
		return
	case s.upkeep.do != compacting:
		// What they may have needed. When a later rotation is compacting, the next file
		// has readers who do.
		s.sealer.Forget()
	}
	r.ready = nil
}

// closeAllReplaced waits for their readers.
func (s *Store) closeAllReplaced() {
	for _, f := range s.replaced.files {
		f.close()
	}
}

func (f *replacedFile) close() {
	if f.stuck {
		_ = f.file.Close()
		return
	}
	closeFile(f.db, f.file)
}

// keepName makes the file's new name durable. Nothing is written before: after a
// power failure the name could be the old file's.
func (s *Store) keepName() error {
	if !s.renamed {
		return nil
	}
	err := s.step(stepSyncName, func() error { return syncDir(filepath.Dir(s.cfg.Path)) })
	if err == nil {
		s.renamed = false
	}
	return err
}

// discard removes the new file.
func (c *compaction) discard(log *slog.Logger) {
	closeFile(c.db, c.file)
	if err := os.Remove(c.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("what is left of a compaction can't be removed", "error", err)
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
