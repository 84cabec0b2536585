package store

import (
	"sync"

	bolt "go.etcd.io/bbolt"
)

// Shared is a workspace in memory, for all who read it while its record is as it is:
// nobody changes anything of it.
type Shared struct {
	Workspace
	row string // what it was decoded from; empty: not from its row alone

	encode   sync.Once
	encoding []byte
	err      error
}

// Encoding returns what encode has made of the workspace for the first who asked,
// which nobody changes either. All ask with the same function.
func (w *Shared) Encoding(encode func(*Workspace) ([]byte, error)) ([]byte, error) {
	w.encode.Do(func() { w.encoding, w.err = encode(&w.Workspace) })
	return w.encoding, w.err
}

// sharedBytes is how much memory shared workspaces take, about.
const sharedBytes = 8 << 20

// sharing finds what was decoded from a row, as long as that is among those that
// were read last. The row itself is looked at, in the reader's transaction: what it
// finds is what the reader would decode, and whoever writes has nothing to do with
// it. Its zero value is empty.
type sharing struct {
	mu sync.Mutex
	// By id. What is in neither was not read for long: once the newer ones take half
	// of sharedBytes, the older ones go.
	newer, older map[string]*Shared
	bytes        int // of newer
}

// size is about what a workspace takes: what it was decoded from, as much again for
// its encoding, and what Go's maps and slices take.
func (w *Shared) size() int { return 2*len(w.row) + 2<<10 }

// get returns what this row of the id was decoded into; nil: that is not known.
func (s *sharing) get(id, row []byte) *Shared {
	s.mu.Lock()
	w := s.newer[string(id)]
	if w == nil {
		w = s.older[string(id)]
	}
	s.mu.Unlock()
	if w == nil || w.row != string(row) {
		return nil
	}
	return w
}

// keep keeps what was read, for the next reader.
func (s *sharing) keep(ws ...*Shared) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range ws {
		before := s.newer[w.ID]
		if w.row == "" || w == before {
			continue
		}
		if before != nil {
			s.bytes -= before.size()
		}
		if s.bytes+w.size() > sharedBytes/2 {
			s.newer, s.older, s.bytes = nil, s.newer, 0
		}
		if s.newer == nil {
			s.newer = make(map[string]*Shared)
		}
		s.newer[w.ID] = w
		s.bytes += w.size()
	}
}

// shared is the workspace of a row, with the rollouts that its record is older than.
func (s *Store) shared(tx *bolt.Tx, id, row []byte, rollouts []rollout) (*Shared, error) {
	w := s.sharing.get(id, row)
	if w == nil {
		w = &Shared{row: string(row)}
		if decodeCoded(w.row, &w.Workspace) != nil || !w.valid(id) {
			return nil, &RowError{string(bucketWorkspaces), string(id)}
		}
	}
	if len(rollouts) > 0 {
		own := &Shared{Workspace: w.Workspace}
		if takeIn(tx, &own.Workspace, rollouts) { // of which it changes nothing that others have, too
			return own, nil
		}
	}
	return w, nil
}

// SharedWorkspace is Workspace for a reader who changes nothing of it.
func (s *Store) SharedWorkspace(id string) (w *Shared, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		key := []byte(id)
		row := tx.Bucket(bucketWorkspaces).Get(key)
		if row == nil {
			return &NotFoundError{WorkspaceID: id}
		}
		rollouts, err := rolloutsOf(tx)
		if err == nil {
			w, err = s.shared(tx, key, row, rollouts)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	s.sharing.keep(w)
	return w, nil
}

// ListShared is ListWorkspaces for a reader who changes nothing of them.
func (s *Store) ListShared(after string, limit int, match func(*Workspace) bool) (ws []*Shared, more bool, err error) {
	ws, more, err = listBy(after, limit, s.readShared, func(w **Shared) *Workspace { return &(*w).Workspace }, match)
	if err == nil {
		s.sharing.keep(ws...)
	}
	return ws, more, err
}

func (s *Store) readShared(after string, n int) (chunk []*Shared, err error) {
	chunk = make([]*Shared, 0, n)
	err = s.view(func(tx *bolt.Tx) error {
		rollouts, err := rolloutsOf(tx)
		if err != nil {
			return err
		}
		_, _, err = eachRow(tx, after, n, func(id, row []byte) error {
			w, err := s.shared(tx, id, row, rollouts)
			chunk = append(chunk, w)
			return err
		})
		return err
	})
	return chunk, err
}
