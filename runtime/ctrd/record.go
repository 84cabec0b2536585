package ctrd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
)

// record is what is known of an instance beside what containerd knows. It lies
// in the instance's directory on a tmpfs, which lives exactly as long as a
// process of it can, where no container sees it. It holds no secret.
type record struct {
	ID                 string    `json:"id"`
	WorkspaceID        string    `json:"workspace_id"`
	WorkspaceUID       string    `json:"workspace_uid"`
	PreparedGeneration int64     `json:"prepared_generation"`
	ImageDigest        string    `json:"image_digest"`
	CreateTime         time.Time `json:"create_time"`
	// Snapshotter has its snapshot; empty: containerd has to be asked which.
	Snapshotter string `json:"snapshotter,omitempty"`
	// Init is the program that its first process runs until it is started.
	Init fileID `json:"init"`
	// PID and PIDStart (clock ticks since boot) name the first process; 0 until
	// there is one.
	PID      int    `json:"pid,omitempty"`
	PIDStart uint64 `json:"pid_start,omitempty"`
	// Launch is written before the go-ahead, and removed again when it failed.
	Launch *launchRecord `json:"launch,omitempty"`
	// Stopping: we have told it to end; written before it is told.
	Stopping bool `json:"stopping,omitempty"`
	// Removing: a removal has begun. One that finds it set follows one that was
	// interrupted.
	Removing bool `json:"removing,omitempty"`
	// Exit is kept when it became known.
	Exit *runtime.Exit `json:"exit,omitempty"`
}

type launchRecord struct {
	Generation     int64            `json:"generation"`
	SecretVersions map[string]int64 `json:"secret_versions,omitempty"`
	GlobalSecrets  []string         `json:"global_secrets,omitempty"`
	// Files are the names of its files.
	Files []string `json:"files,omitempty"`
	// StartTime is not in a record that was made ahead: it is when that was put into
	// its place.
	StartTime time.Time `json:"start_time,omitzero"`
}

// recordFile is an instance's record; armedFile is, before its start, what will be.
const (
	recordFile = "record.json"
	armedFile  = "armed.json"
)

// instanceID matches the ids that runtime.NewInstanceID makes.
var instanceID = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{12}$`)

// workspaceUID is what a workspace's uid looks like: it becomes a file name.
var workspaceUID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$`)

func (d *Driver) instanceDir(uid, id string) string { return filepath.Join(d.instances, uid, id) }

// ioDir is what the container sees as handshake.Dir.
func (d *Driver) ioDir(uid, id string) string { return filepath.Join(d.instanceDir(uid, id), "io") }

// makeInstanceDir makes the instance's directory, which is empty but for ioDir.
func (d *Driver) makeInstanceDir(uid, id string) error {
	d.mu.Lock() // its workspace's directory must not go meanwhile
	defer d.mu.Unlock()
	if err := os.MkdirAll(d.ioDir(uid, id), 0o755); err != nil {
		return err
	}
	d.remember(uid, id)
	if known, ok := d.recordedOf[uid]; ok {
		known[strings.Clone(id)] = true
	}
	return nil
}

// removeInstanceDir removes it, and the workspace's with the last one.
func (d *Driver) removeInstanceDir(uid, id string) error {
	if err := os.RemoveAll(d.instanceDir(uid, id)); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.owners, id)
	delete(d.recordedOf[uid], id)
	err := unix.Rmdir(filepath.Join(d.instances, uid))
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// remember keeps whose an instance is, by copies: the strings may be parts of
// something larger. d.mu is held.
func (d *Driver) remember(uid, id string) {
	if d.owners == nil {
		d.owners = make(map[string]string)
	}
	d.owners[strings.Clone(id)] = strings.Clone(uid)
}

// owner returns the uid of the workspace below which the instance has its
// directory, "" when it has none.
func (d *Driver) owner(id string) (uid string, err error) {
	d.mu.Lock()
	uid = d.owners[id]
	d.mu.Unlock()
	if uid != "" {
		return uid, nil
	}
	uids, err := d.recordedUIDs()
	if err != nil {
		return "", err
	}
	for _, uid := range uids {
		_, err := os.Lstat(d.instanceDir(uid, id))
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return "", err
		}
		d.mu.Lock()
		d.remember(uid, id)
		d.mu.Unlock()
		return uid, nil
	}
	return "", nil
}

// errDamaged: a record is there that says nothing. Nobody but us writes one, so
// it was tampered with, or is another version's.
var errDamaged = errors.New("damaged record")

// readRecord returns the instance's record, nil if there is none. Where asking
// again does not help the error is errDamaged.
func (d *Driver) readRecord(uid, id string) (*record, error) {
	b, changed, err := readFile(filepath.Join(d.instanceDir(uid, id), recordFile))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return nil, err // of this process or machine, not of the record
	case err != nil:
		return nil, fmt.Errorf("%w of instance %s: %w", errDamaged, id, err)
	}
	r, err := decodeRecord(b, uid, id)
	if err != nil {
		return nil, fmt.Errorf("%w of instance %s: %w", errDamaged, id, err)
	}
	if r.Launch != nil && r.Launch.StartTime.IsZero() {
		r.Launch.StartTime = changed
	}
	return r, nil
}

// readFile reads a file and when it was changed, which a rename is too.
func readFile(path string) (content []byte, changed time.Time, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, time.Time{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	content, err = io.ReadAll(f)
	return content, changeTime(&st), err
}

func changeTime(st *unix.Stat_t) time.Time { return time.Unix(st.Ctim.Unix()) }

// decodeRecord reads the record of that instance and refuses any other. What it
// holds becomes path names, and numbers of processes that are killed.
func decodeRecord(b []byte, uid, id string) (*record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, err
	}
	switch {
	case r.ID != id || r.WorkspaceUID != uid:
		return nil, fmt.Errorf("it is of instance %q, workspace %q", r.ID, r.WorkspaceUID)
	case !workspaceID.MatchString(r.WorkspaceID):
		return nil, fmt.Errorf("%q is no workspace id", r.WorkspaceID)
	case r.PID < 0 || (r.PID == 0) != (r.PIDStart == 0):
		return nil, fmt.Errorf("there is no process %d begun at %d", r.PID, r.PIDStart)
	}
	return &r, nil
}

// updateRecord changes the instance's record, if there is one, as a step of that
// name. Whoever has read it before may hold an older one: it is changed as it is
// now. The record as it was written is returned.
func (d *Driver) updateRecord(ctx context.Context, step string, old *record, change func(*record)) (rec *record, err error) {
	err = d.step(ctx, step, func(context.Context) error {
		d.recordMu.Lock()
		defer d.recordMu.Unlock()
		rec, err = d.changeRecord(old, change)
		return err
	})
	return rec, err
}

// changeRecord is updateRecord's work. d.recordMu is held.
func (d *Driver) changeRecord(old *record, change func(*record)) (*record, error) {
	d.disarm(old.ID)
	rec, err := d.readRecord(old.WorkspaceUID, old.ID)
	if rec == nil || err != nil {
		return nil, err
	}
	change(rec)
	err = d.writeRecord(rec)
	if errors.Is(err, unix.ENOSPC) && d.dropReserve(rec) == nil {
		err = d.writeRecord(rec)
	}
	return rec, err
}

// readRecordOrNone is readRecord where a damaged record is none: containerd and
// /proc know the rest.
func (d *Driver) readRecordOrNone(uid, id string) (*record, error) {
	rec, err := d.readRecord(uid, id)
	if errors.Is(err, errDamaged) {
		d.log.Warn("instance record not read", "instance", id, "error", err)
		return nil, nil
	}
	return rec, err
}

// writeRecord replaces the record at once. It needs no fsync: a crash of the
// machine takes the processes along with the tmpfs.
func (d *Driver) writeRecord(r *record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(d.instanceDir(r.WorkspaceUID, r.ID), recordFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return errors.Join(err, ignoreMissing(os.Remove(path+".new")))
	}
	return os.Rename(path+".new", path)
}

// ignoreMissing drops an error that says there is nothing to remove.
func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// A standby keeps room for its later records: when the tmpfs is full it must show
// before the old instance is stopped. A secret's name and version take less room
// than what it takes of the launch, but for a few bytes.
const (
	reserveFile = "reserve"
	filesFile   = "reserve-files" // likewise, for the files
	minReserve  = 8 << 10
	maxReserve  = 256 << 10
)

// makeReserve makes room for the records and files of a launch as the spec knows it.
func (d *Driver) makeReserve(r *record, spec runtime.Spec) error {
	dir := d.instanceDir(r.WorkspaceUID, r.ID)
	size := min(minReserve+2*spec.LaunchBytes, maxReserve)
	err := os.WriteFile(filepath.Join(dir, reserveFile), make([]byte, size), 0o600)
	if err == nil && spec.FileBytes > 0 {
		err = os.WriteFile(filepath.Join(dir, filesFile), make([]byte, spec.FileBytes), 0o600)
	}
	return err
}

// dropReserve gives the room back, once the launch is on record.
func (d *Driver) dropReserve(r *record) error {
	return errors.Join(d.dropFilesReserve(r), ignoreMissing(os.Remove(filepath.Join(d.instanceDir(r.WorkspaceUID, r.ID), reserveFile))))
}

func (d *Driver) dropFilesReserve(r *record) error {
	return ignoreMissing(os.Remove(filepath.Join(d.instanceDir(r.WorkspaceUID, r.ID), filesFile)))
}

// recordedUIDs returns the uids of the workspaces that have a directory.
func (d *Driver) recordedUIDs() ([]string, error) { return subdirectories(d.instances, workspaceUID) }

// recordedIDs returns the ids of the workspace's instances that have a directory.
func (d *Driver) recordedIDs(uid string) ([]string, error) {
	ids, err := subdirectories(filepath.Join(d.instances, uid), instanceID)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return ids, err
}

func subdirectories(dir string, name *regexp.Regexp) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if e.IsDir() && name.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
