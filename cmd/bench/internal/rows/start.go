package rows

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	"github.com/workspaced/workspaced/cmd/internal/lab"
)

// startSizes say how much is measured.
type startSizes struct {
	workspaces, rounds int
	slow               func() error // nil, or a further step in the start with workspaces
}

// startStopped measures the daemon's start, from exec to SERVING, with a database
// full of stopped workspaces: beside its start with an empty one, and beside what
// it takes bbolt to read all rows of that file once. Its containerd runs already.
func startStopped(ctx context.Context, env *Env) ([]measure.Result, error) {
	return stoppedStarts(ctx, env, startSizes{workspaces: librarySize, rounds: 5})
}

func stoppedStarts(ctx context.Context, env *Env, sizes startSizes) (_ []measure.Result, err error) {
	program, err := env.program("workspaced")
	if err != nil {
		return nil, err
	}
	lib, err := openLibrary(ctx, env, sizes.workspaces)
	if err != nil {
		return nil, err
	}
	dir, remove, err := env.temp("s")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	containerd := &lab.Containerd{Dir: filepath.Join(dir, "c")}
	if err := containerd.Start(ctx); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, containerd.Stop()) }()

	full := &lab.Daemon{Binary: program, Base: filepath.Join(dir, "f"), Own: containerd}
	none := &lab.Daemon{Binary: program, Base: filepath.Join(dir, "n"), Own: containerd}
	for _, d := range []*lab.Daemon{full, none} {
		if err := os.MkdirAll(d.Base, 0o755); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, d.Kill(), d.Purge(ctx)) }()
	}
	if err := lib.copyTo(full.DataDir()); err != nil {
		return nil, err
	}

	var fullTook, noneTook, scanTook measure.Samples
	side := func(d *lab.Daemon, into *measure.Samples, slow func() error) func() error {
		timed := measure.Timed(into, time.Millisecond, 1, func() error {
			if slow != nil {
				if err := slow(); err != nil {
					return err
				}
			}
			return d.Start(ctx)
		})
		return func() error { return errors.Join(timed(), d.Stop()) }
	}
	startNone := side(none, new(measure.Samples), nil)
	if err := startNone(); err != nil { // it makes its database, once
		return nil, err
	}
	err = measure.Alternate(ctx, sizes.rounds,
		side(full, &fullTook, sizes.slow),
		side(none, &noneTook, nil),
		measure.Timed(&scanTook, time.Millisecond, 1, func() error { return scan(databaseIn(full.DataDir())) }),
	)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("idle/start with %d stopped", sizes.workspaces)
	return []measure.Result{
		measure.Compare(name, "ms", fullTook, "with an empty database", noneTook, measure.MedianAtMost(2000)),
		measure.Compare(name+" beside bbolt", "ms", fullTook, "bbolt reads every row of the file once", scanTook),
	}, nil
}

// scan opens a database as bbolt does it and reads every byte of every row.
func scan(path string) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	sum := crc32.NewIEEE()
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				_, _ = sum.Write(k)
				_, err := sum.Write(v)
				return err
			})
		})
	})
	return errors.Join(err, db.Close())
}
