package rows

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sync/errgroup"

	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// librarySize is how many workspaces a large database has.
const librarySize = 100_000

// libraryWriters is how many write it at once: as many as share a commit.
const libraryWriters = 256

// library is a data directory whose database is full of stopped workspaces, with
// what a typical one has. Rows share it, and copy what they write to.
type library struct {
	dir  string
	size int
}

// openLibrary returns the library of the size, which the first row to ask for it
// makes.
func openLibrary(ctx context.Context, env *Env, size int) (*library, error) {
	l := &library{dir: filepath.Join(env.Dir, "library-"+strconv.Itoa(size)), size: size}
	if _, err := os.Stat(l.dir); !errors.Is(err, fs.ErrNotExist) {
		return l, err
	}
	env.logf("making a database of %d workspaces", size)
	making, remove, err := env.temp("making-")
	if err != nil {
		return nil, err
	}
	err = fillLibrary(ctx, making, size)
	if err == nil {
		err = os.Rename(making, l.dir)
	}
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	return l, nil
}

func libraryID(i int) string { return fmt.Sprintf("workspace-%06d", i) }

func fillLibrary(ctx context.Context, dir string, size int) (err error) {
	st, err := openData(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	writers, ctx := errgroup.WithContext(ctx)
	for first := range libraryWriters {
		writers.Go(func() error {
			for i := first; i < size; i += libraryWriters {
				if err := fillWorkspace(ctx, st, i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return writers.Wait()
}

func fillWorkspace(ctx context.Context, st *store.Store, i int) error {
	id := libraryID(i)
	_, err := st.CreateWorkspace(ctx, store.NewWorkspace{
		ID:     id,
		Labels: map[string]string{"team": fmt.Sprint("team-", i%100), "env": "production", "owner": fmt.Sprint("user-", i%1000)},
		Spec: store.Spec{
			Image:     "registry.example.com/team/program:1.2.3",
			Args:      []string{"--listen", "/run/program.sock"},
			Env:       map[string]string{"LOG_LEVEL": "info", "REGION": "eu-1", "SHARD": fmt.Sprint(i % 16)},
			Resources: store.Resources{MemoryBytes: 256 << 20, Pids: 100},
		},
		Model:   "large",
		Secrets: secretsOf(3),
	}, store.Options{})
	if err != nil {
		return err
	}
	_, err = st.StopWorkspace(ctx, id, store.Options{})
	return err
}

// openData opens the database in a data directory, as the daemon would.
func openData(dir string) (*store.Store, error) {
	kek, err := seal.LoadOrCreate(filepath.Join(dir, "workspaced.key"))
	if err != nil {
		return nil, err
	}
	return store.Open(store.Config{Path: databaseIn(dir), KEK: kek})
}

func databaseIn(dir string) string { return filepath.Join(dir, "workspaced.db") }

// copyTo makes a data directory of a copy.
func (l *library) copyTo(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"workspaced.key", "workspaced.db"} {
		if err := copyFile(filepath.Join(dir, name), filepath.Join(l.dir, name)); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close()) // or it would be written while it is measured
}
