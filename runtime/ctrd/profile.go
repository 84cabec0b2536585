package ctrd

import (
	"fmt"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/workspaced/workspaced/runtime"
)

// restrictedCaps are what a package manager needs that runs as root, and what
// drops root's rights: files of other owners, other users' ids, ending their
// processes.
var restrictedCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
}

// baselineCaps are those that the Kubernetes Pod Security Standards allow under
// this name: containerd's own, without raw and packet sockets.
var baselineCaps = append([]string{
	"CAP_AUDIT_WRITE", "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_SYS_CHROOT",
}, restrictedCaps...)

// profileOpts are what a profile adds to containerd's default specification,
// which has its masked and read-only paths and allows no device. They come after
// all that changes capabilities, at which the seccomp profile looks.
func profileOpts(profile runtime.Profile) []oci.SpecOpts {
	if profile == runtime.ProfilePrivileged {
		return []oci.SpecOpts{oci.WithPrivileged, oci.WithNewPrivileges, oci.WithAllDevicesAllowed, oci.WithHostDevices}
	}
	caps, privileges := restrictedCaps, oci.WithNoNewPrivileges
	if profile == runtime.ProfileBaseline {
		caps, privileges = baselineCaps, oci.WithNewPrivileges
	}
	return []oci.SpecOpts{
		oci.WithDefaultUnixDevices,
		oci.WithCapabilities(caps),
		oci.WithAmbientCapabilities(nil),
		privileges,
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.CgroupNamespace}),
		seccomp.WithDefaultProfile(),
	}
}

// checkProfile refuses a profile that is none, or that the settings don't allow.
func (d *Driver) checkProfile(profile runtime.Profile) error {
	switch profile {
	case "", runtime.ProfileRestricted, runtime.ProfileBaseline:
		return nil
	case runtime.ProfilePrivileged:
		if d.cfg.Policy.AllowPrivileged {
			return nil
		}
		return notAllowed("the workspace is privileged: the daemon's setting allow_privileged does not allow it")
	}
	return notAllowed("%q is no security profile", profile)
}

func notAllowed(format string, args ...any) error {
	return &runtime.Error{Reason: runtime.ReasonNotAllowed, Message: fmt.Sprintf(format, args...)}
}
