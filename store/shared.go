package store

import (
	"errors"
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

var errNotEncoded = errors.New("store: a workspace can't be encoded: it has made the function panic")

// Encoding returns what encode has made of the workspace for the first who asked,
// which nobody changes either. All ask with the same function.
func (w *Shared) Encoding(encode func(*Workspace) ([]byte, error)) ([]byte, error) {
	w.encode.Do(func() {
		w.err = errNotEncoded // stays if encode panics: Do does nothing again
		w.encoding, w.err = encode(&w.Workspace)
	})
	return w.encoding, w.err
}

const (
	// sharedBytes is how much memory shared workspaces take at most, about.
	sharedBytes = 8 << 20
	// maxSharedRow is the longest row that is shared: a few of them must not take the
	// place of all others.
	maxSharedRow = 64 << 10
)

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

// size is about what a workspace takes, rather too much: what it was decoded from, as
// much again for its encoding and for strings that are no part of the row as it is,
// and what Go's maps and slices take, which can be ten times what the row does.
func (w *Shared) size() int {
	const perElement = 112 // of a slice of volumes, twice as long as it need be; a map's are smaller
	n := len(w.Labels) + w.Spec.elements()
	if good := w.Status.LastGood; good != nil {
		n += good.Spec.elements()
	}
	if r := w.Status.Running; r != nil {
		n += len(r.SecretVersions) + len(r.GlobalSecrets)
	}
	return 3*len(w.row) + perElement*n + 2<<10
}

// elements is how many there are in the spec's slices and maps.
func (s *Spec) elements() int {
	return len(s.Command) + len(s.Args) + len(s.Env) + len(s.Volumes) + len(s.ModelEnv)
}

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
		if w.row == "" || len(w.row) > maxSharedRow || w == before {
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
