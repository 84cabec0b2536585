package access

import (
	"fmt"
	"strings"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Roles is a set of roles.
type Roles uint32

// RolesOf is the set of these.
func RolesOf(roles ...workspacev1.Role) (set Roles) {
	for _, r := range roles {
		set |= 1 << r
	}
	return set &^ (1 << workspacev1.Role_ROLE_UNSPECIFIED)
}

// AnyOf is the set of the roles that contain one of these: who has any of the set
// may what one of these may.
func AnyOf(roles ...workspacev1.Role) (set Roles) {
	for _, r := range roles {
		set |= RolesOf(r)
		switch r {
		case workspacev1.Role_ROLE_VIEWER:
			set |= RolesOf(workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_SECRET_WRITER, workspacev1.Role_ROLE_ADMIN)
		case workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_SECRET_WRITER:
			set |= RolesOf(workspacev1.Role_ROLE_ADMIN)
		}
	}
	return set
}

// List are the roles in the set, in the order of the .proto.
func (r Roles) List() (list []workspacev1.Role) {
	for i := workspacev1.Role(0); int(i) < len(workspacev1.Role_name); i++ {
		if r&(1<<i) != 0 {
			list = append(list, i)
		}
	}
	return list
}

// RoleName is a role as configuration and messages write it: `secret-writer`.
func RoleName(r workspacev1.Role) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_")), "_", "-")
}

// bindable are the roles that can be given to somebody: the last one is the
// daemon's to give.
var bindable = []workspacev1.Role{
	workspacev1.Role_ROLE_VIEWER, workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_SECRET_WRITER, workspacev1.Role_ROLE_ADMIN,
}

func parseRole(name string) (workspacev1.Role, error) {
	var names []string
	for _, r := range bindable {
		if RoleName(r) == name {
			return r, nil
		}
		names = append(names, RoleName(r))
	}
	return 0, fmt.Errorf("%q is none of the roles %s", name, strings.Join(names, ", "))
}

// RoleNames are roles as configuration, messages and the store write them.
func RoleNames(roles []workspacev1.Role) (names []string) {
	for _, r := range roles {
		names = append(names, RoleName(r))
	}
	return names
}
