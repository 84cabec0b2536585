package server

import (
	"errors"
	"fmt"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"
)

// patternWords say what would be right where a pattern in the .proto is not met.
var patternWords = map[string]string{
	`^[a-z0-9]([a-z0-9._/-]*[a-z0-9])?$`:                    "a label's key must be lower case letters, digits and . _ / -, beginning and ending with a letter or digit",
	`^[^\x00]*$`:                                            "must not contain a NUL",
	`^[^\x00-\x20\x7f]+$`:                                   "must not contain spaces or control characters",
	`^[A-Za-z_][A-Za-z0-9_]*$`:                              "must be a variable's name: letters, digits and _, not beginning with a digit",
	`^[A-Za-z_][A-Za-z0-9_]{0,127}$`:                        "must be a variable's name: at most 128 letters, digits and _, not beginning with a digit",
	`^(/[^\x00]*)?$`:                                        "must be an absolute path, or empty",
	`^/[^\x00]*$`:                                           "must be an absolute path",
	`^/[^\x00]+$`:                                           "must be an absolute path other than /",
	`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`:                  "must be at most 63 lower case letters, digits and -, beginning and ending with a letter or digit",
	`^([a-z]([a-z0-9-]{0,61}[a-z0-9])?)?$`:                  "must be at most 63 lower case letters, digits and -, beginning with a letter and not ending with -; empty: the server makes one",
	`^[\x21-\x7e]{0,128}$`:                                  "must be at most 128 printable ASCII characters without spaces",
	`^workspaces/[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`:          "must be workspaces/{workspace}, with an id of at most 63 lower case letters, digits and -, beginning with a letter and not ending with -",
	`^(workspaces/[a-z]([a-z0-9-]{0,61}[a-z0-9])?|global)$`: "must be workspaces/{workspace}, or global for the secrets of all workspaces",
	`^(workspaces/[a-z]([a-z0-9-]{0,61}[a-z0-9])?/)?secrets/[A-Za-z_][A-Za-z0-9_]{0,127}$`:                           "must be workspaces/{workspace}/secrets/{key}, or secrets/{key} for a secret of all workspaces; a key is at most 128 letters, digits and _, not beginning with a digit",
	`^([a-z]([a-z0-9-]{0,61}[a-z0-9])?|[a-z][a-z0-9-]{0,61}\*)?$`:                                                    "must be a workspace's id, or how ids begin and a * behind it, or empty",
	`^[a-z0-9]([a-z0-9._@/-]{0,61}[a-z0-9])?$`:                                                                       "must be at most 63 lower case letters, digits and . _ @ / -, beginning and ending with a letter or digit",
	`^tokens/[a-z0-9]{1,63}$`:                                                                                        "must be tokens/{token}, as ListTokens names it",
	`^(workspaces/[a-z]([a-z0-9-]{0,61}[a-z0-9])?/)?secrets/[A-Za-z_][A-Za-z0-9_]{0,127}/versions/[1-9][0-9]{0,17}$`: "must be workspaces/{workspace}/secrets/{key}/versions/{version}, or secrets/{key}/versions/{version} for a secret of all workspaces; a version is a number from 1 upward",
	`^[A-Za-z0-9_.][A-Za-z0-9_.-]*(:[A-Za-z0-9_.][A-Za-z0-9_.-]*)?$|^$`:                                              "must be user, uid, user:group or uid:gid, or empty",
}

// addRules adds what the rules in the .proto say. Neither their own words nor
// ours hold the value that they judge.
func addRules(vs *violations, prefix string, m proto.Message) error {
	err := protovalidate.Validate(m)
	var invalid *protovalidate.ValidationError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &invalid):
		return fmt.Errorf("validate %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	for _, v := range invalid.Violations {
		vs.add(prefix+protovalidate.FieldPathString(v.Proto.GetField()), "%s", wordsOf(v))
	}
	return nil
}

// oneofWords say it for the oneofs, which have no name in JSON.
var oneofWords = map[string]string{
	"payload": "must have a value: text, or data in base64",
	"source":  "must have one of host_path and volume_name",
}

func wordsOf(v *protovalidate.Violation) string {
	switch elements := v.Proto.GetField().GetElements(); {
	case v.Proto.GetRuleId() == "required" && len(elements) > 0:
		if words, ok := oneofWords[elements[len(elements)-1].GetFieldName()]; ok {
			return words
		}
		return "is required"
	case v.Proto.GetRuleId() == "string.min_len" && v.RuleValue.Uint() == 1:
		return "is required"
	}
	if v.Proto.GetRuleId() == "string.pattern" {
		if words, ok := patternWords[v.RuleValue.String()]; ok {
			return words
		}
	}
	if message := v.Proto.GetMessage(); message != "" {
		return message
	}
	return "must satisfy the rule " + v.Proto.GetRuleId()
}
