package runtime

import (
	"slices"
	"strings"
)

// Profile says what an instance's processes may do to the machine. What each
// contains stands with workspace.v1.SecurityProfile; its values are these with a
// prefix.
type Profile string

// The profiles; an empty one is ProfileRestricted. A driver refuses any other.
const (
	ProfileRestricted Profile = "RESTRICTED"
	ProfileBaseline   Profile = "BASELINE"
	ProfilePrivileged Profile = "PRIVILEGED"
)

// DefaultPids limits the processes and threads of an instance whose spec names no
// limit, unless it is privileged. A development environment has some hundred;
// what has thousands is about to take the machine's.
const DefaultPids = 4096

// PidsLimit is how many processes and threads there may be; 0: any number.
func (s *Spec) PidsLimit() int64 {
	if s.Resources.Pids == 0 && s.Profile != ProfilePrivileged {
		return DefaultPids
	}
	return s.Resources.Pids
}

// Policy says what the daemon's settings let a spec ask of the machine. The zero
// value allows the least.
type Policy struct {
	// AllowPrivileged allows ProfilePrivileged.
	AllowPrivileged bool
	// HostPaths are the directories that host paths lie in, or the files that they
	// are; absolute and clean. None: there are no host paths.
	HostPaths []string
}

// AllowsHostPath tells whether an absolute and clean path lies in one of
// HostPaths by its name. What it leads to is known when it is mounted.
func (p Policy) AllowsHostPath(path string) bool {
	return slices.ContainsFunc(p.HostPaths, func(dir string) bool { return Within(path, dir) })
}

// Within tells whether a clean absolute path is dir, or below it, by its name.
func Within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
