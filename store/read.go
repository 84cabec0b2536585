package store

import (
	"cmp"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// Workspace returns a workspace, or a *NotFoundError.
func (s *Store) Workspace(id string) (w Workspace, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		w, err = getWorkspace(tx, id)
		return err
	})
	if err != nil {
		return Workspace{}, err
	}
	return w, nil
}

// listChunk is how many records one read transaction decodes at most: a long one
// would hold up a writer that has to grow the file.
const listChunk = 512

// ListWorkspaces returns the workspaces whose id comes after the given one and
// that match (nil: all), by id, at most limit (0: all), and whether there are
// more. Match is called outside of any transaction; a long list is read in
// several, and a workspace that changes meanwhile comes once, as it was when it
// was read.
func (s *Store) ListWorkspaces(after string, limit int, match func(*Workspace) bool) (ws []Workspace, more bool, err error) {
	return listBy(after, limit, s.readWorkspaces, func(w *Workspace) *Workspace { return w }, match)
}

// listBy is ListWorkspaces of what read returns n of, of each the workspace.
func listBy[W any](after string, limit int, read func(after string, n int) ([]W, error), workspace func(*W) *Workspace, match func(*Workspace) bool) (ws []W, more bool, err error) {
	n := listChunk
	if limit > 0 {
		n = min(limit+1, listChunk) // the one more says that there are more
	}
	for ; ; n = min(2*n, listChunk) {
		chunk, err := read(after, n)
		if err != nil {
			return nil, false, err
		}
		if ws == nil {
			ws = chunk[:0] // no place behind the one that is looked at is written
		}
		for i := range chunk {
			if match != nil && !match(workspace(&chunk[i])) {
				continue
			}
			if limit > 0 && len(ws) == limit {
				return ws, true, nil
			}
			ws = append(ws, chunk[i])
		}
		if len(chunk) < n {
			if len(ws) == 0 {
				return nil, false, nil
			}
			return ws, false, nil
		}
		after = workspace(&chunk[len(chunk)-1]).ID
	}
}

func (s *Store) readWorkspaces(after string, n int) (chunk []Workspace, err error) {
	chunk = make([]Workspace, 0, n)
	err = s.view(func(tx *bolt.Tx) error {
		_, _, err := eachWorkspace(tx, after, n, func(w *Workspace) { chunk = append(chunk, *w) })
		return err
	})
	return chunk, err
}

// ownerIn finds the owner of a scope; *NotFoundError when there is no such
// workspace.
func ownerIn(tx *bolt.Tx, scope Scope) (owner, error) {
	if scope.Global() {
		return owner{}, nil
	}
	w, err := getWorkspace(tx, scope.WorkspaceID)
	return ownerOf(&w), err
}

// secretIn finds a secret of a scope.
func secretIn(tx *bolt.Tx, scope Scope, key string) (o owner, r secretRecord, err error) {
	if o, err = ownerIn(tx, scope); err == nil {
		r, err = o.find(tx, nil, key)
	}
	return o, r, err
}

// Secret returns one secret's metadata, or a *NotFoundError, or a *KeyError with
// ErrUnreadable when its row is damaged.
func (s *Store) Secret(scope Scope, key string) (secret Secret, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		o, r, err := secretIn(tx, scope, key)
		secret = o.metadata(key, &r)
		return err
	})
	if err != nil {
		return Secret{}, err
	}
	return secret, nil
}

// ListSecrets returns the metadata of a scope's secrets whose key comes after
// the given one, by key, at most limit (0: all), and whether there are more. Of
// one whose row is damaged only the key is known: its version is 0. It returns a
// *NotFoundError when there is no such workspace.
func (s *Store) ListSecrets(scope Scope, after string, limit int) (secrets []Secret, more bool, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		o, err := ownerIn(tx, scope)
		if err != nil {
			return err
		}
		o.each(tx, nil, after, func(key string, r *secretRecord) bool {
			switch {
			case r.Deleted:
			case limit > 0 && len(secrets) == limit:
				more = true
				return false
			default:
				secrets = append(secrets, o.metadata(key, r))
			}
			return true
		})
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	return secrets, more, nil
}

// Snapshot returns a workspace with the values of all the secrets that its
// container gets, from one read transaction: the global ones and its own, which
// win, by key. It returns a *NotFoundError, a *KeyError with ErrUnreadable when
// one of them can't be opened, or ErrDamaged when one is missing.
func (s *Store) Snapshot(id string) (snapshot Snapshot, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		w, err := getWorkspace(tx, id)
		if err != nil {
			return err
		}
		type source struct {
			owner owner
			row   secretRecord
		}
		merged, staged := map[string]source{}, map[string]bool{}
		var incomplete error // told when no secret is to be named
		for _, o := range []owner{{}, ownerOf(&w)} {
			var rows sums
			want, x, err := openOwner(tx, s.sealer, o.name())
			if err != nil {
				return err
			}
			found := 0
			o.each(tx, &x, "", func(key string, r *secretRecord) bool {
				rows.add(key, r)
				// An own one that is gone for good leaves the key to the global one, of which
				// only the newest value is there.
				staged[key] = r.Staged
				found++
				switch {
				case !x.knows(o.row(key)):
					found-- // somebody has put it there; it is damaged
					fallthrough
				case !r.Deleted:
					merged[key] = source{o, *r}
				}
				return true
			})
			if want.missing(&rows) || found != x.len() {
				incomplete = cmp.Or[error](incomplete, damagedOwner(o.name()))
			}
			// The owner's own row may lie in one page with its other ones, and if that page
			// is not the newest one they agree. What they do not know of the values tell,
			// which are in other pages.
			if err := o.eachValued(tx, func(key string) {
				if from, ok := merged[key]; !ok || from.owner != o {
					merged[key] = source{o, secretRecord{damaged: true}}
				}
			}); err != nil {
				return err
			}
		}
		snapshot.Workspace = w
		for key, from := range merged {
			value, err := from.owner.open(tx, s.sealer, key, &from.row)
			if err != nil {
				return err
			}
			snapshot.Secrets = append(snapshot.Secrets, OpenedSecret{
				Key: key, Version: from.row.Version, Value: value, Delivery: from.row.Delivery.known(),
				Global: from.owner.scope.Global(),
			})
		}
		for key, waits := range staged {
			if waits {
				snapshot.Staged = append(snapshot.Staged, key)
			}
		}
		return incomplete
	})
	if err != nil {
		return Snapshot{}, err
	}
	slices.Sort(snapshot.Staged)
	slices.SortFunc(snapshot.Secrets, func(a, b OpenedSecret) int { return cmp.Compare(a.Key, b.Key) })
	return snapshot, nil
}
