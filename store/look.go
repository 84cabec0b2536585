package store

import (
	"log/slog"

	bolt "go.etcd.io/bbolt"
)

// Look reads from a database that nobody has open what needs no key: its uid, and
// the ids and uids of its workspaces, for who removes what they have left. It
// changes nothing, migrates nothing, and looks at no secret, so that a key which is
// lost, or a key service which is away, keeps nobody from cleaning up. Errors are
// those of Open, but for those of keys.
func Look(path string) (instance string, workspaces []Workspace, err error) {
	cfg := Config{Path: path, Logger: slog.New(slog.DiscardHandler)}
	if err := checkOpenFile(&cfg); err != nil {
		return "", nil, readError(path, err)
	}
	db, file, err := openFile(path, true)
	if err != nil {
		return "", nil, err
	}
	defer closeFile(db, file)
	err = guard(func() error {
		return db.View(func(tx *bolt.Tx) error {
			kept, err := identify(tx, cfg, len(migrations)+1)
			if err != nil {
				return err
			}
			instance = kept.instance
			return tx.Bucket(bucketWorkspaces).ForEach(func(k, v []byte) error {
				var w Workspace
				if err := decode(bucketWorkspaces, k, v, &w); err != nil {
					return err
				}
				workspaces = append(workspaces, Workspace{ID: w.ID, UID: w.UID})
				return nil
			})
		})
	})
	if err != nil {
		return "", nil, openError(path, err)
	}
	return instance, workspaces, nil
}
