package lab

import (
	"errors"
	"io/fs"
	"os"
	"strings"
)

// FaultsProgram is the daemon built with the tag faults: its steps fail by rules.
const FaultsProgram = "workspaced-faults"

// SetFaults makes the daemon's steps fail, or no longer, from now on: each is a
// rule as package fault reads it.
func (d *Daemon) SetFaults(rules ...string) error {
	if d.faults == "" {
		return errors.New("daemon: it knows no faults")
	}
	return errors.Join(
		os.WriteFile(d.faults+".next", []byte(strings.Join(rules, ",")), 0o600),
		os.Rename(d.faults+".next", d.faults),
	)
}

// Struck counts the faults, `step:moment:action`, that the daemon which runs has
// had, but for kills.
func (d *Daemon) Struck() (map[string]int, error) {
	text, err := os.ReadFile(d.faults + ".struck")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	count := map[string]int{}
	for line := range strings.Lines(string(text)) {
		count[strings.TrimSpace(line)]++
	}
	return count, err
}
