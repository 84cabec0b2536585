package ctrd

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

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
	// Init is the program that its first process runs until it is started.
	Init fileID `json:"init"`
	// PID and PIDStart (clock ticks since boot) name the first process; 0 until
	// there is one.
	PID      int    `json:"pid,omitempty"`
	PIDStart uint64 `json:"pid_start,omitempty"`
	// Launch is written before the go-ahead, and removed again when it failed.
	Launch *launchRecord `json:"launch,omitempty"`
	// Removing: a removal has begun. One that finds it set follows one that was
	// interrupted.
	Removing bool `json:"removing,omitempty"`
	// Exit is kept when it became known.
	Exit *runtime.Exit `json:"exit,omitempty"`
}

type launchRecord struct {
	Generation     int64            `json:"generation"`
	SecretVersions map[string]int64 `json:"secret_versions,omitempty"`
	StartTime      time.Time        `json:"start_time"`
}

const recordFile = "record.json"

// instanceID matches the ids that newID makes.
var instanceID = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{12}$`)

func (d *Driver) instanceDir(id string) string { return filepath.Join(d.instances, id) }

// ioDir is what the container sees as handshake.Dir.
func (d *Driver) ioDir(id string) string { return filepath.Join(d.instances, id, "io") }

// readRecord returns the instance's record, nil if there is none.
func (d *Driver) readRecord(id string) (*record, error) {
	b, err := os.ReadFile(filepath.Join(d.instanceDir(id), recordFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("record of instance %s: %w", id, err)
	}
	return &r, nil
}

// writeRecord replaces the record at once. It needs no fsync: a crash of the
// machine takes the processes along with the tmpfs.
func (d *Driver) writeRecord(r *record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(d.instanceDir(r.ID), recordFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// recordedIDs returns the ids of all instance directories.
func (d *Driver) recordedIDs() ([]string, error) {
	entries, err := os.ReadDir(d.instances)
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		if e.IsDir() && instanceID.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}
