package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// entry is a line of the journal: a start, or that one was told to end.
type entry struct {
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
	Ends bool      `json:"ends,omitempty"`
	// Alone is false when another start of the same workspace was still running.
	Alone bool              `json:"alone,omitempty"`
	Env   map[string]string `json:"env,omitempty"`
}

// enroll adds this start to the journal at path, which is for tests whose secrets
// are none. Each start holds the journal's lock until its end, so that two which
// run at once are noticed.
func enroll(path, id string, env map[string]string) error {
	// Never closed: the kernel takes the lock back when the process ends.
	lock, err := syscall.Open(path+".lock", syscall.O_CREAT|syscall.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err == nil {
		err = syscall.Flock(lock, syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil && !errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("lock %s.lock: %w", path, err)
	}
	return write(path, entry{ID: id, Time: time.Now(), Alone: err == nil, Env: env})
}

// write adds a line to the journal.
func write(path string, e entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	journal, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = journal.Write(append(line, '\n')) // in one piece, whatever becomes of us
	return errors.Join(err, journal.Close())
}
