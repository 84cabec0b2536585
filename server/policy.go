package server

import (
	"context"
	"fmt"
	"reflect"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// admit refuses a spec that asks more of the machine than the caller may or the
// daemon's settings allow. CreateWorkspace and UpdateWorkspace ask it, and nobody else takes a
// spec. An update that leaves the spec as it is passes, whatever is in there.
//
// Who makes a container privileged is the machine's root, which no scope holds: it
// takes an admin of everything.
//
// The driver holds the settings once more whenever it makes a container: a spec
// may be older than they are, and a host path lead somewhere else than its name
// says.
func (s *Server) admit(ctx context.Context, workspace string, before, after *store.Spec) error {
	if before != nil && reflect.DeepEqual(before, after) {
		return nil
	}
	if after.Security == store.SecurityPrivileged {
		if err := access.Allowed(ctx, workspacev1.Role_ROLE_ADMIN, access.Target{}); err != nil {
			return err
		}
		if !s.specs.AllowPrivileged {
			return forbidden(ReasonPrivileged, workspace, "allow_privileged", "asks for security_profile SECURITY_PROFILE_PRIVILEGED")
		}
	}
	for i := range after.Volumes {
		if path := after.Volumes[i].HostPath; path != "" && !s.specs.AllowsHostPath(path) {
			return forbidden(ReasonHostPath, workspace, "allowed_host_paths", fmt.Sprintf("asks in volumes[%d] for host_path %q", i, path))
		}
	}
	return nil
}

// forbidden names the setting that is in the way.
func forbidden(reason, workspace, setting, what string) error {
	e := precondition(reason, workspace, shorten(what, maxFieldBytes)+", which the daemon's setting "+setting+" does not allow")
	e.metadata["setting"] = setting
	return e
}
